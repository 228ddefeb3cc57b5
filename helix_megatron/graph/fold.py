"""What makes a graph of 16 ranks readable: equal ranks folded into one, operators gathered into modules.

Ranks are of equal structure when they run the same operators on tensors of the same shapes, with the same
tensors between them. A rank's program, in its order, is a tree of modules: a block holds a run of consecutive
operators of one module, so blocks follow each other as operators do, and collapsing them never makes a cycle.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from helix_megatron.graph.model import COLLECTIVE, INPUT, SOURCES, Graph, Node


@dataclass
class RankClass:
    """Ranks of equal structure; the nodes are those of the first. `places` are their indices in the program."""

    ranks: list[int]
    nodes: list[Node]
    edges: list[tuple[int, int, int, int]]

    @property
    def first(self) -> int:
        return self.ranks[0]


@dataclass
class Block:
    """A run of consecutive operators of one module; `children` are blocks and places of operators."""

    label: str
    path: str
    children: list[Block | int] = field(default_factory=list)

    def places(self) -> Iterable[int]:
        """Places of all operators in it, in order."""
        for child in self.children:
            if isinstance(child, Block):
                yield from child.places()
            else:
                yield child


@dataclass
class Item:
    """What is drawn as one: a collective, an input, or the operators of a block between two collectives."""

    kind: str
    label: str
    places: list[int]


def rank_classes(graph: Graph) -> list[RankClass]:
    """Ranks of equal structure together, in the order of their first rank."""
    programs = graph.programs
    place = {node.id: index for nodes in programs.values() for index, node in enumerate(nodes)}
    edges: dict[int, list[tuple[int, int, int, int]]] = {rank: [] for rank in programs}
    for edge in graph.edges:
        rank = graph.node[edge.target].rank
        edges[rank].append((place[edge.source], edge.output, place[edge.target], edge.input))
    classes: dict[tuple, RankClass] = {}
    run = ("kind", "op", "module", "phase", "micro_batch")
    signature = operator.attrgetter(*run, "inputs", "outputs", "group", "purpose")
    for rank, nodes in sorted(programs.items()):
        key = (tuple(map(signature, nodes)), tuple(edges[rank]))
        classes.setdefault(key, RankClass([], nodes, edges[rank])).ranks.append(rank)
    return list(classes.values())


def module_path(module: str) -> list[str]:
    """A module's path as people read it: `decoder.layers.0.mlp.linear_fc1` → layer 0, mlp, linear_fc1."""
    module = module.removeprefix("decoder.")
    module = re.sub(r"(^|\.)layers\.(\d+)", r"\1layer \2", module)
    module = re.sub(r"(^|\.)(?:local_)?experts\.(\d+)", r"\1expert \2", module)
    return module.split(".")


def tree(nodes: Sequence[Node]) -> Block:
    """The program of a rank: phases, layers, modules, operators. Weights and buffers are left out."""
    root = Block("", "")
    several = len({node.micro_batch for node in nodes}) > 1
    for place, node in enumerate(nodes):
        if node.kind in SOURCES and node.kind != INPUT:
            continue
        phase = f"{node.phase}, micro-batch {node.micro_batch}" if several else node.phase
        block = root
        for label in [phase, *module_path(node.module)] if node.module else [phase]:
            last = block.children[-1] if block.children else None
            if not isinstance(last, Block) or last.label != label:
                last = Block(label, f"{block.path}/{label}")
                block.children.append(last)
            block = last
        block.children.append(place)
    return root


def items(
    root: Block,
    nodes: Sequence[Node],
    expanded: Callable[[Block, int], bool],
    *,
    apart: bool = False,
) -> list[Item]:
    """What is drawn of a rank, in order.

    Args:
        expanded: (block, its depth) → whether its children are drawn in its place. Collectives inside a block
            that is not expanded are drawn all the same and cut it into parts.
        apart: every operator is an item of its own.
    """
    found: list[Item] = []
    for place, block in _shown(root, expanded):
        node, last = nodes[place], found[-1] if found else None
        if node.kind in (COLLECTIVE, INPUT):
            found.append(Item(node.kind, node.op, [place]))
        elif not apart and last is not None and (last.kind, last.label) == ("block", block.path):
            last.places.append(place)
        else:
            found.append(Item("block", block.path, [place]))
    return found


def _shown(
    block: Block, expanded: Callable[[Block, int], bool], depth: int = 0
) -> Iterator[tuple[int, Block]]:
    """(place, the block in which it is drawn) of the operators below a block, in order."""
    opened = expanded(block, depth)
    for child in block.children:
        if not isinstance(child, Block):
            yield child, block
        elif opened:
            yield from _shown(child, expanded, depth + 1)
        else:
            yield from ((place, block) for place in child.places())


def item_edges(
    found: Sequence[Item], edges: Sequence[tuple[int, int, int, int]], nodes: Sequence[Node]
) -> dict[tuple[int, int], str]:
    """(from item, to item) → the largest tensor between them, and how many more."""
    where = {place: index for index, item in enumerate(found) for place in item.places}
    tensors: dict[tuple[int, int], dict[tuple[int, int], object]] = {}
    for source, output, target, _ in edges:
        if source in where and target in where and where[source] != where[target]:
            pair = where[source], where[target]
            tensors.setdefault(pair, {})[source, output] = nodes[source].outputs[output]
    labels = {}
    for pair, between in tensors.items():
        specs = sorted(between.values(), key=lambda spec: -spec.nbytes)  # type: ignore[attr-defined]
        more = f" +{len(specs) - 1}" if len(specs) > 1 else ""
        labels[pair] = f"{specs[0]}{more}"
    return labels
