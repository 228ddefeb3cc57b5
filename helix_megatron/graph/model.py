"""The graph as data: nodes, edges, collectives and weights of all ranks, and its JSON form.

A node is what one rank does: an operator, its part in a collective, or something that is there before the
first operator (a weight, an input, a buffer). An edge is a tensor on its way from the node that makes it to one
that reads it, on the same rank. Between ranks data moves in collectives only: a `Collective` joins the nodes by
which its ranks take part. Needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

FORMAT = "helix-graph"
VERSION = 1

# Kinds of nodes.
OPERATOR = "operator"
COLLECTIVE = "collective"
PARAMETER = "parameter"
INPUT = "input"  # tokens, positions, labels
BUFFER = "buffer"  # tensors that exist before the pass: gradient buffers, rotary frequencies
SOURCES = (PARAMETER, INPUT, BUFFER)
KINDS = (OPERATOR, COLLECTIVE, *SOURCES)

FORWARD, BACKWARD, GRADIENTS = "forward", "backward", "gradients"

BITS = {"bf": (16,), "f": (16, 32, 64), "i": (8, 16, 32, 64), "u": (8,)}  # of elements, by kind
DTYPES = {f"{kind}{n}": n // 8 for kind, bits in BITS.items() for n in bits} | {"bool": 1}  # bytes


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a tensor, written `bf16[625, 1, 8192]`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(slots=True)
class Node:
    """What one rank does at one point of its program.

    Args:
        id: unique, `r3.17`: rank and place in its program.
        kind: one of `KINDS`.
        op: the operator's name (`aten.mm`), the collective (`all-gather`), or the name of a weight or input.
        module: path of the module that runs it, layers numbered over all pipeline stages.
        ranks: where it runs: one rank, in a graph that is right.
        phase: forward, backward, or gradients (what follows the backward pass).
        inputs, outputs: tensors, in the operator's order. A tensor that is changed in place is an output.
        flops: of matrix products and attention; a multiply-add counts as two. 0 for all else.
        bytes: read and written by the operator; 0 for views.
        sent_bytes: of a collective, what this rank sends by a bandwidth-optimal algorithm.
        group, purpose: of a collective: process group and who asked for it.
        micro_batch: which one it works on, counted from 0.
        view: whether it moves no data: another view of an input, or an allocation.
    """

    id: str
    kind: str
    op: str
    module: str
    ranks: tuple[int, ...]
    phase: str = FORWARD
    inputs: tuple[Spec, ...] = ()
    outputs: tuple[Spec, ...] = ()
    flops: int = 0
    bytes: int = 0
    sent_bytes: int = 0
    group: str = ""
    purpose: str = ""
    micro_batch: int = 0
    view: bool = False

    @property
    def rank(self) -> int:
        return self.ranks[0]


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor from output `output` of node `source` to input `input` of node `target`."""

    source: str
    output: int
    target: str
    input: int


@dataclass(slots=True)
class Collective:
    """What joins ranks: the nodes by which they take part in one collective, or a send and its receive.

    `ranks` are those of the group, in its order; `members` the nodes, in the same order; `sent_bytes` what all
    of them send together. From the first to the last rank for `send`.
    """

    id: str
    kind: str
    group: str
    purpose: str
    ranks: tuple[int, ...]
    members: tuple[str, ...]
    sent_bytes: int


@dataclass(slots=True)
class Weight:
    """One rank's part of a canonical weight.

    Args:
        rank: that holds it.
        name: canonical name, with the numbers of layer and expert.
        local_name: of the parameter in this rank's model.
        node: the parameter's node, if the pass uses it.
        shape: of the whole canonical tensor.
        spec: of the part.
        axis: that is cut; None where the rank holds all of it.
        runs: (start, length) of what the rank holds along the axis, in its order.
    """

    rank: int
    name: str
    local_name: str
    shape: tuple[int, ...]
    spec: Spec
    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()
    node: str = ""


@dataclass
class Graph:
    """All ranks of one run.

    `settings` say what was traced: sizes, layout and model flags. `ranks` has a mapping for each rank: its
    place and its memory (`traced_peak` and what it consists of, in bytes).
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)

    @cached_property
    def node(self) -> dict[str, Node]:
        """Nodes by id. Not to be asked before the graph is complete."""
        return {node.id: node for node in self.nodes}

    @cached_property
    def place(self) -> dict[int, dict[str, Any]]:
        """What `ranks` says of each."""
        return {entry["rank"]: entry for entry in self.ranks}

    @cached_property
    def programs(self) -> dict[int, list[Node]]:
        """Nodes of each rank, in the order of its program."""
        return _by(self.nodes, "rank")

    @cached_property
    def producers(self) -> dict[str, list[Edge]]:
        """Edges into each node."""
        return _by(self.edges, "target")

    @cached_property
    def consumers(self) -> dict[str, list[Edge]]:
        """Edges out of each node."""
        return _by(self.edges, "source")

    # ------------------------------------------------------------------- JSON

    def to_json(self) -> dict[str, Any]:
        """A mapping that `json` can write."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "settings": self.settings,
            "ranks": self.ranks,
            "nodes": [_plain(node) for node in self.nodes],
            "edges": [[e.source, e.output, e.target, e.input] for e in self.edges],
            "collectives": [_plain(one) for one in self.collectives],
            "weights": [_plain(weight) for weight in self.weights],
        }

    def write(self, path: Path) -> None:
        """Write the JSON form."""
        path.write_text(json.dumps(self.to_json(), separators=(",", ":")))


def _by(items: Iterable[Any], key: str) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(getattr(item, key), []).append(item)
    return found


_DEFAULTS = {"phase": FORWARD, "axis": None}


def _plain(value: Node | Collective | Weight) -> dict[str, Any]:
    """Fields of a dataclass; specs as text, and what has its default left out."""
    plain = {}
    for name in value.__slots__:
        item = getattr(value, name)
        if isinstance(item, tuple):
            item = [str(entry) if isinstance(entry, Spec) else entry for entry in item]
        if item != _DEFAULTS[name] if name in _DEFAULTS else item:
            plain[name] = str(item) if isinstance(item, Spec) else item
    return plain
