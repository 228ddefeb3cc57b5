"""What a picture of a graph shows and where: boxes, collectives across columns, and curves for tensors.

One column for each rank, or for each class of equal ranks, its program downwards; a box for the operators of a
module; a wide box for each collective, over the columns of the ranks that take part, at one height for all of
them, below everything that they ran before it. Units are points; y grows downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from helix_megatron.graph.fold import Block, Item, RankClass, item_edges, items, rank_classes, tree
from helix_megatron.graph.model import COLLECTIVE, Collective, Graph, Node
from helix_megatron.units import count, size

COLORS = (  # part of a module's path → fill
    ("layernorm", "#eceff4"),
    ("self_attention", "#d8e6f7"),
    ("router", "#e9dcf5"),
    ("mlp", "#dbeedd"),
    ("embedding", "#f5ead0"),
    ("output_layer", "#f5ead0"),
)
PLAIN, EXCHANGE, REDUCTION, BETWEEN_STAGES = "#f4f4f4", "#f6c7b0", "#ffe2a8", "#e3c8ee"
LINE, ARROW, TOP = 13.0, 5.0, 96.0
NARROW, BROAD, MARGIN, LANE_GAP = 168.0, 300.0, 14.0, 64.0
LETTER = 5.4  # width of a letter
FEW = 2  # columns that are drawn broad
CORNER = 16.0  # from a column's edge to where tensors enter and leave a collective
FAR = 12  # steps after which a tensor's line is pale


@dataclass
class Box:
    """Centre and size; the first line of text is the title."""

    name: str
    lines: list[str]
    color: str
    shape: str = "box"
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    columns: list[int] = field(default_factory=list)

    @property
    def height(self) -> float:
        return LINE * len(self.lines) + 8.0


@dataclass
class Line:
    """A tensor from box to box: the four points of a Bézier curve, and the tip of its arrow."""

    source: str
    target: str
    label: str
    points: list[tuple[float, float]]
    tip: tuple[float, float]
    saved: bool
    far: bool


def flop(number: float) -> str:
    """`197 kFLOP`."""
    text = count(number)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1:].isalpha() else f"{text} FLOP"


def expansion(graph: Graph, detail: str) -> Callable[[Block, int], bool]:
    """Which blocks are drawn open: phases and layers; in a view of one half of a layer, its module, too; with
    `operators` all of them."""
    if detail == "operators":
        return lambda block, depth: True
    opened = {"mha": "self_attention", "mlp": "mlp"}.get(graph.name[:3])
    layer = "layer "
    return lambda block, depth: depth <= 1 or block.label.startswith(layer) or block.label == opened


class Picture:
    """A graph, laid out: one box for each of `modules`, or of `operators`; ranks of equal structure may be
    folded into one column."""

    def __init__(self, graph: Graph, *, detail: str = "modules", fold: bool = True) -> None:
        self.graph, self.detail = graph, detail
        self.classes = rank_classes(graph)
        if not fold:
            alone = [RankClass([r], c.nodes, c.edges) for c in self.classes for r in c.ranks]
            self.classes = sorted(alone, key=lambda one: one.first)
        self.few = len(self.classes) <= FEW
        self.width = BROAD if self.few else NARROW
        self.pitch = self.width + LANE_GAP
        self._nodes = [graph.programs[one.first] for one in self.classes]
        opened = expansion(graph, detail)
        apart = detail == "operators"
        self._items = [items(tree(nodes), nodes, opened, apart=apart) for nodes in self._nodes]
        self.collectives: dict[str, Box] = {}
        self.columns = self._boxes()
        self._place()

    @property
    def right(self) -> float:
        return 2 * MARGIN + LANE_GAP + self.pitch * len(self.classes)

    @property
    def bottom(self) -> float:
        boxes = [box for column in self.columns for box in column]
        return max((box.y + box.height for box in boxes), default=TOP) + MARGIN

    def middle(self, column: int) -> float:
        """Where a column's centre line is."""
        return MARGIN + LANE_GAP + self.pitch * column + self.width / 2

    def phases(self, column: int) -> list[str]:
        """The phase of each box of a column."""
        nodes = self._nodes[column]
        return [nodes[item.places[0]].phase for item in self._items[column]]

    def lines(self, column: int) -> list[Line]:
        """The tensors between the boxes of a column."""
        found = []
        phases = self.phases(column)
        boxes = self.columns[column]
        between = item_edges(self._items[column], self.classes[column].edges, self._nodes[column])
        for (a, b), label in between.items():
            saved = phases[a] != phases[b]
            points, tip = self._curve(boxes[a], boxes[b], b - a, self.middle(column), saved)
            far = saved or b - a > FAR
            found.append(Line(boxes[a].name, boxes[b].name, label, points, tip, saved, far))
        return found

    # -------------------------------------------------------------------- boxes

    def _boxes(self) -> list[list[Box]]:
        collective_of = {name: one for one in self.graph.collectives for name in one.members}
        columns = []
        for column, found in enumerate(self._items):
            nodes = self._nodes[column]
            boxes = []
            for index, item in enumerate(found):
                one = None
                if item.kind == COLLECTIVE:
                    one = collective_of.get(nodes[item.places[0]].id)
                if one is None:
                    box = self._box(item, nodes, f"k{column}_{index}")
                else:
                    box = self.collectives.setdefault(one.id, Box(one.id, [], REDUCTION))
                box.columns.append(column)
                boxes.append(box)
            columns.append(boxes)
        for one in self.graph.collectives:
            if one.id in self.collectives:
                self._describe(self.collectives[one.id], one)
        return columns

    def _box(self, item: Item, nodes: list[Node], name: str) -> Box:
        first, last = nodes[item.places[0]], nodes[item.places[-1]]
        if item.kind != "block":
            return Box(name, [first.op, *map(str, first.outputs[:2])], "white", "ellipse")
        operators = [nodes[place] for place in item.places if not nodes[place].view]
        if self.detail == "operators":
            lines = [first.op, ", ".join(map(str, first.inputs))]
        else:
            title = item.label.rpartition("/")[2]
            residual = title.startswith("layer ") and first.op.startswith("aten.add")
            names = (node.op.removeprefix("aten.").partition(".")[0] for node in operators)
            lines = [f"{title}: residual" if residual else title, ", ".join(dict.fromkeys(names))]
        lines += [str(spec) for spec in last.outputs[:1]]
        flops = sum(node.flops for node in operators)
        if flops:
            lines.append(flop(flops))
        color = next((color for part, color in COLORS if part in first.module), PLAIN)
        return Box(name, [self._short(line) for line in lines if line], color)

    def _describe(self, box: Box, one: Collective) -> None:
        """Text and colour of a collective's box. Equal groups of folded ranks are counted."""
        shown = sum(len(self.classes[column].ranks) for column in box.columns)
        alike = shown // max(len(one.ranks), 1)
        ranks = f"{len(one.ranks)} ranks"
        groups = f"{alike} groups of {ranks}" if alike > 1 else ranks
        group = one.group.removesuffix("_GROUP").replace("_", " ").lower()
        title = one.kind + (f" {one.purpose}" if one.purpose != one.group else "")
        each = f"{size(one.sent_bytes / max(len(one.members), 1))} sent by each"
        box.lines = [title, f"{groups}, {group}", each]
        if len(box.columns) > 3:
            box.lines = [f"{title}: {groups}, {group}, {each}"]
        if one.purpose.startswith("exchange"):
            box.color = EXCHANGE
        elif one.kind == "send":
            box.color = BETWEEN_STAGES

    def _short(self, text: str) -> str:
        letters = int(self.width / LETTER)
        return text if len(text) <= letters else text[: letters - 2] + " …"

    # ------------------------------------------------------------------- places

    def _place(self) -> None:
        def cell(box: Box) -> Cell:
            return Cell(box.height, box.name if box.name in self.collectives else None)

        tops_of = heights([list(map(cell, column)) for column in self.columns], TOP)
        for column, tops in zip(self.columns, tops_of, strict=True):
            for box, top in zip(column, tops, strict=True):
                first, last = min(box.columns), max(box.columns)
                box.y = top + box.height / 2
                box.width = self.pitch * (last - first) + self.width
                box.x = (self.middle(first) + self.middle(last)) / 2

    def _curve(
        self, a: Box, b: Box, steps: int, middle: float, saved: bool
    ) -> tuple[list[tuple[float, float]], tuple[float, float]]:
        """From box a down to box b: straight to the next, around the boxes between them otherwise."""
        if steps == 1:
            start, end = a.y + a.height / 2, b.y - b.height / 2
            ys = (start, start + 2, end - ARROW - 2, end - ARROW)
            return [(middle, y) for y in ys], (middle, end)
        side = -1 if saved else 1
        out = side * min(16.0 + 2.6 * steps, 1.33 * (LANE_GAP - 14.0))
        edge = middle + side * self.width / 2
        inside = edge - side * CORNER
        points = [(edge, a.y), (edge + out, a.y + 8), (edge + out, b.y - 2)]
        if a.name in self.collectives:  # it goes on into the next column: out of its lower side
            points[:2] = [(inside, a.y + a.height / 2), (edge + out, a.y + a.height / 2 + 16)]
        if b.name in self.collectives:  # and into its upper one
            top = b.y - b.height / 2
            points[2:] = [(edge + out, top - 24), (inside, top - ARROW)]
            return points, (inside, top)
        return [*points, (edge + side * ARROW, b.y)], (edge, b.y)


GAP = 22.0  # between two boxes of a column


@dataclass
class Cell:
    """What is to be placed: its height, and what it shares its place with in other columns."""

    height: float
    shared: Hashable | None = None


def heights(columns: Sequence[Sequence[Cell]], top: float = 0.0) -> list[list[float]]:
    """The upper edge of every cell.

    Cells of different columns with the same `shared` get the same one. Should columns have them in different
    orders, which a run that ends cannot, those left over are placed one by one.
    """
    owners: dict[Hashable, set[int]] = {}
    for number, column in enumerate(columns):
        for cell in column:
            if cell.shared is not None:
                owners.setdefault(cell.shared, set()).add(number)
    found: list[list[float]] = [[] for _ in columns]
    free = [top] * len(columns)

    def head(number: int) -> Cell | None:
        placed = len(found[number])
        return columns[number][placed] if placed < len(columns[number]) else None

    while True:
        heads = {number: one for number in range(len(columns)) if (one := head(number))}
        if not heads:
            return found
        for number, cell in heads.items():
            together = {number} if cell.shared is None else owners[cell.shared]
            if all(other in heads and heads[other].shared == cell.shared for other in together):
                break
        else:  # crossed: the first is placed alone
            number, cell = next(iter(heads.items()))
            together = {number}
            owners[cell.shared] -= together
        y = max(free[other] for other in together)
        for other in together:
            found[other].append(y)
            free[other] = y + heads[other].height + GAP
