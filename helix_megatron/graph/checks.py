"""What must hold of an operator graph. A check gives a figure when it passes, and the violations when not."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from helix_megatron.errors import listed
from helix_megatron.graph.build import MESSAGE
from helix_megatron.graph.check_model import Outcome, dimensions, residuals, weights
from helix_megatron.graph.model import COLLECTIVE, OPERATOR, Collective, Graph, Node, Spec
from helix_megatron.units import count, size

BALANCE = 1.1  # the most by which the busiest rank may exceed the idlest
SHOWN = 5  # violations that are printed


@dataclass(frozen=True)
class Result:
    """A check's outcome: its figure, and what violates it."""

    name: str
    figure: str
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.passed:
            return f"passed  {self.name}: {self.figure}"
        shown = [f"\n          {problem}" for problem in self.problems[:SHOWN]]
        rest = len(self.problems) - SHOWN
        more = f"\n          and {rest} more" if rest > 0 else ""
        return f"FAILED  {self.name}:" + "".join(shown) + more


def run_checks(graph: Graph, *, balance: float = BALANCE) -> list[Result]:
    """All checks; `balance` is by what factor the busiest rank may exceed the idlest, in FLOPs and bytes."""
    results = [acyclic(graph), shapes_agree(graph), one_rank_each(graph)]
    whole = _is_whole(graph)
    for name, check in (
        ("every cross-rank edge is a collective", collectives),
        ("residuals present", residuals),
        ("local dimensions sum to global ones", dimensions),
        ("balanced, largest over smallest rank", lambda graph: balanced(graph, balance)),
        ("every weight element on its ranks", weights),
    ):
        outcome = check(graph) if whole else ("", ("not checked: nodes or ranks are missing",))
        results.append(Result(name, *outcome))
    return results


def _is_whole(graph: Graph) -> bool:
    """Whether edges and collectives end at nodes, nodes at ranks, and ranks have their places."""
    ends = {name for edge in graph.edges for name in (edge.source, edge.target)}
    ends |= {name for one in graph.collectives for name in one.members}
    ranks = {node.ranks[0] if node.ranks else -1 for node in graph.nodes}
    placed = {entry["rank"] for entry in graph.ranks}
    return ends <= graph.node.keys() and ranks == placed == set(range(graph.settings["ranks"]))


# ----------------------------------------------------------------------------- structure


def acyclic(graph: Graph) -> Result:
    """No operator waits for itself, when the ranks of a collective wait for each other.

    A rank runs its collectives in the order of its program, so each waits for the one before it, whether or not
    it reads anything of it. Messages between pipeline stages are left out of that order: a send and a receive
    may be under way at the same time, and they wait for data alone.
    """
    place = {node.id: node.id for node in graph.nodes}
    for one in graph.collectives:
        if one.kind != MESSAGE:
            place.update(dict.fromkeys(one.members, one.id))
    before: dict[str, set[str]] = {name: set() for name in place.values()}
    for edge in graph.edges:
        if edge.source in place and edge.target in place:
            before[place[edge.target]].add(place[edge.source])
    for one in graph.collectives:
        if one.kind == MESSAGE and len(one.members) == 2:
            before[one.members[1]].add(one.members[0])
    for earlier, later in _in_program_order(graph):
        if place[earlier] != place[later]:
            before[place[later]].add(place[earlier])
    sorter, depth = TopologicalSorter(before), dict[str, int]()
    with contextlib.suppress(CycleError):
        sorter.prepare()
    while ready := sorter.get_ready():
        for name in ready:
            depth[name] = 1 + max((depth[source] for source in before[name]), default=0)
        sorter.done(*ready)
    stuck = sorted(before.keys() - depth.keys())
    found = f"{len(stuck)} nodes are on cycles or behind them, such as {listed(stuck[:4])}"
    longest = max(depth.values(), default=0)
    figure = f"{len(graph.nodes):,} nodes, {len(graph.edges):,} edges, longest path {longest}"
    return Result("acyclic", figure, (found,) if stuck else ())


def _in_program_order(graph: Graph) -> Iterator[tuple[str, str]]:
    """Consecutive collectives of each rank."""
    messages = {name for one in graph.collectives if one.kind == MESSAGE for name in one.members}
    before: dict[tuple[int, ...], str] = {}
    for node in graph.nodes:
        if node.kind == COLLECTIVE and node.id not in messages:
            if node.ranks in before:
                yield before[node.ranks], node.id
            before[node.ranks] = node.id


def shapes_agree(graph: Graph) -> Result:
    """A tensor is read with the shape and dtype with which it was made, and every input has a source."""
    problems = []
    fed: dict[str, set[int]] = defaultdict(set)
    compared = moved = 0
    read_tensors: set[tuple[str, int]] = set()
    for edge in graph.edges:
        source, target = graph.node.get(edge.source), graph.node.get(edge.target)
        if source is None or target is None:
            problems.append(f"edge {edge.source} → {edge.target} ends at no node")
            continue
        if edge.output >= len(source.outputs) or edge.input >= len(target.inputs):
            problems.append(f"edge {edge.source} → {edge.target} is of no output or no input")
            continue
        fed[target.id].add(edge.input)
        made, read = source.outputs[edge.output], target.inputs[edge.input]
        compared += 1
        moved += made.nbytes
        read_tensors.add((source.id, edge.output))
        if made != read:
            problems.append(f"{_name(source)} makes {made}, {_name(target)} reads {read}")
    for node in graph.nodes:
        missing = set(range(len(node.inputs))) - fed[node.id]
        if missing:
            problems.append(f"{_name(node)}: nothing makes its inputs {listed(sorted(missing))}")
    tensors = sum(len(node.outputs) for node in graph.nodes)
    figure = f"{compared:,} of {len(graph.edges):,} edges, {size(moved)}"
    figure += f"; they read {len(read_tensors):,} of {tensors:,} tensors"
    return Result("shapes agree along every edge", figure, tuple(problems))


def one_rank_each(graph: Graph) -> Result:
    """Every node runs on exactly one rank of the run, and every rank runs something."""
    ranks = range(graph.settings["ranks"])
    ids = Counter(node.id for node in graph.nodes)
    problems = [f"node id {name} occurs twice" for name, k in ids.items() if k > 1]
    operators: Counter[int] = Counter()
    for node in graph.nodes:
        if len(node.ranks) != 1 or node.ranks[0] not in ranks:
            problems.append(f"{node.id} ({node.op}) is on ranks [{listed(node.ranks)}]")
        elif node.kind in (OPERATOR, COLLECTIVE):
            operators[node.rank] += 1
    problems += [f"rank {rank} runs nothing" for rank in ranks if not operators[rank]]
    numbers = operators.values()
    least, most = min(numbers, default=0), max(numbers, default=0)
    figure = f"{sum(numbers):,} operators on {len(ranks)} ranks, {least:,} to {most:,} each"
    return Result("every operator on exactly one rank", figure, tuple(problems))


def collectives(graph: Graph) -> Outcome:
    """Ranks exchange data in collectives only; each has its group, ranks, and bytes that its shapes explain."""
    problems = []
    for edge in graph.edges:
        source, target = graph.node.get(edge.source), graph.node.get(edge.target)
        if source is not None and target is not None and source.ranks != target.ranks:
            problems.append(
                f"a tensor goes from {_name(source)} on rank {listed(source.ranks)} to {_name(target)} on rank "
                f"{listed(target.ranks)} without a collective"
            )
    joined = Counter(member for one in graph.collectives for member in one.members)
    for node in graph.nodes:
        if node.kind == COLLECTIVE and joined[node.id] != 1:
            problems.append(f"{_name(node)} is part of {joined[node.id]} collectives")
    stages = {entry["rank"]: entry["pipeline"] for entry in graph.ranks}
    for one in graph.collectives:
        found = _problems_of(graph, one, stages)
        problems += [f"{one.kind} {one.id}: {problem}" for problem in found]
    sent = sum(one.sent_bytes for one in graph.collectives)
    kinds = Counter(one.kind for one in graph.collectives)
    parts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    figure = f"{len(graph.collectives)} collectives ({parts}), {size(sent)} sent; no other edge between ranks"
    return figure, tuple(problems)


def _problems_of(graph: Graph, one: Collective, stages: dict[int, int]) -> Iterator[str]:
    members = [graph.node[name] for name in one.members if name in graph.node]
    if not one.group:
        yield "it has no group"
    if tuple(node.ranks[0] for node in members) != one.ranks:
        yield f"its ranks are [{listed(one.ranks)}] and its nodes are on [{listed(n.rank for n in members)}]"
        return
    if one.sent_bytes != sum(node.sent_bytes for node in members) or one.sent_bytes <= 0:
        yield f"its ranks send {sum(n.sent_bytes for n in members)} bytes, and it says {one.sent_bytes}"
    if one.kind != MESSAGE:
        yield from _disagreements(members, stages)
        ops = {node.op for node in members}
        for node in members:
            if node.group != one.group or (len(ops) == 1 and node.op != one.kind):
                yield f"{node.id} runs {node.op} in {node.group or 'no group'} instead of {one.group}"
    rule = _RULES.get(one.kind)
    if rule is not None:
        yield from rule(members)


def _disagreements(members: list[Node], stages: dict[int, int]) -> Iterator[str]:
    """Ranks that enter one collective in different places of the program: one of them is in another.

    Ranks of the same pipeline stage run the same modules; those of different stages do not.
    """
    for node in members[1:]:
        first = members[0]
        for field in ("op", "module", "phase", "micro_batch", "purpose"):
            if field == "module" and stages.get(node.rank) != stages.get(first.rank):
                continue
            ours, theirs = getattr(first, field), getattr(node, field)
            if ours != theirs:
                yield (
                    f"its ranks are in different collectives: {field.replace('_', '-')} is {ours} on rank "
                    f"{first.rank} ({first.id}) and {theirs} on rank {node.rank} ({node.id})"
                )


def _numel(specs: Iterable[Spec]) -> int:
    return sum(spec.numel for spec in specs)


def _nbytes(node: Node) -> int:
    """Of what it gives."""
    return sum(spec.nbytes for spec in node.inputs)


def _same_sizes(members: list[Node]) -> Iterator[str]:
    """All ranks give and get tensors of the same sizes."""
    sizes = {(tuple(s.numel for s in n.inputs), tuple(s.numel for s in n.outputs)) for n in members}
    if len(sizes) > 1:
        yield f"its ranks bring tensors of different sizes: {listed(sorted(sizes))}"


def _gathered(members: list[Node]) -> Iterator[str]:
    """Everyone gets what all give."""
    given, k = sum(_numel(node.inputs) for node in members), len(members)
    for node in members:
        if _numel(node.outputs) != given:
            yield f"{node.id} gets {_numel(node.outputs)} elements of the {given} that its ranks give"
    yield from _ring(members, lambda node: (k - 1) * _nbytes(node))


def _scattered(members: list[Node]) -> Iterator[str]:
    """What all get together is what each gives."""
    got, k = sum(_numel(node.outputs) for node in members), len(members)
    for node in members:
        if _numel(node.inputs) != got:
            yield f"{node.id} gives {_numel(node.inputs)} elements, and its ranks get {got}"
    yield from _ring(members, lambda node: (k - 1) * _nbytes(node) // k)


def _reduced(members: list[Node]) -> Iterator[str]:
    yield from _same_sizes(members)
    k = len(members)
    yield from _ring(members, lambda node: 2 * (k - 1) * _nbytes(node) // k)


def _swapped(members: list[Node]) -> Iterator[str]:
    """What is sent is received."""
    given = sum(_numel(node.inputs) for node in members)
    got = sum(_numel(node.outputs) for node in members)
    if given != got:
        yield f"its ranks give {given} elements and get {got}"
    for node in members:
        if not 0 < node.sent_bytes <= _nbytes(node):
            yield f"{node.id} sends {node.sent_bytes} bytes of {_nbytes(node)}"


def _sent(members: list[Node]) -> Iterator[str]:
    sender, receiver = members
    if sender.inputs != receiver.outputs:
        yield f"{listed(sender.inputs)} is sent, and {listed(receiver.outputs)} received"


def _ring(members: list[Node], formula: Callable[[Node], int]) -> Iterator[str]:
    for node in members:
        if node.sent_bytes != formula(node):
            yield f"{node.id} sends {node.sent_bytes} bytes, and its shapes make {formula(node)}"


_RULES: dict[str, Callable[[list[Node]], Iterator[str]]] = {
    "all-reduce": _reduced,
    "all-gather": _gathered,
    "reduce-scatter": _scattered,
    "all-to-all": _swapped,
    MESSAGE: _sent,
    "broadcast": _same_sizes,
}


# ------------------------------------------------------------------------------- balance


def balanced(graph: Graph, limit: float = BALANCE) -> Outcome:
    """Ranks compute about as much as each other, and read and write about as many bytes."""
    problems, figures = [], []
    for what, show in (("flops", count), ("bytes", size)):
        totals: Counter[int] = Counter(dict.fromkeys(range(graph.settings["ranks"]), 0))
        for node in graph.nodes:
            totals[node.rank] += getattr(node, what)
        least, most = min(totals.values()), max(totals.values())
        ratio = most / least if least else float("inf")
        title = "FLOPs" if what == "flops" else what
        figures.append(f"{title} {ratio:.3f} ({show(least)} to {show(most)})")
        if ratio > limit:
            busiest, idlest = (pick(totals, key=totals.__getitem__) for pick in (max, min))
            problems.append(
                f"{what}: rank {busiest} has {show(most)}, rank {idlest} has {show(least)}, {ratio:.3f} times "
                f"as many; at most {limit:g} is balanced"
            )
    return ", ".join(figures), tuple(problems)


def _name(node: Node) -> str:
    return f"{node.id} {node.module}: {node.op}"
