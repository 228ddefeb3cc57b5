"""Join the ranks of a run into one graph, and cut views of it.

The k-th collective that a rank runs in a group is the k-th of every other rank of that group; the k-th message
from one rank to another is the k-th that the other receives. That is how torch.distributed pairs them, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from helix_megatron.graph.model import (
    BACKWARD,
    FORWARD,
    INPUT,
    SOURCES,
    Collective,
    Edge,
    Graph,
    Node,
)

if TYPE_CHECKING:
    from helix_megatron.graph.trace import Participation, RankTrace
    from helix_megatron.run.config import RunConfig

COMPLETE, ATTENTION, MLP = (
    "complete_helix_model",
    "mha_layer_{}_partitioned",
    "mlp_layer_{}_tensor_parallel",
)
MESSAGE = "send"


def build(
    run: RunConfig, *, backward: bool = False, micro_batches: int = 1, jobs: int = 1
) -> Graph:
    """Trace all ranks of a run and join them.

    The arguments and errors are those of `helix_megatron.graph.trace.trace_all`.
    """
    from helix_megatron.graph.flags import settings_of
    from helix_megatron.graph.trace import trace_all

    traces = trace_all(run, backward=backward, micro_batches=micro_batches, jobs=jobs)
    settings = settings_of(run) | {"backward": backward, "micro_batches": micro_batches}
    return join(traces, COMPLETE, settings)


def join(traces: Iterable[RankTrace], name: str, settings: dict[str, Any]) -> Graph:
    """One graph of all ranks that were traced."""
    graph = Graph(name, settings)
    joined: dict[Any, list[tuple[int, Participation]]] = {}
    for traced in traces:
        graph.nodes += traced.nodes
        graph.edges += traced.edges
        graph.weights += traced.weights
        names = ("flops", "bytes", "sent_bytes")
        totals = {name: sum(getattr(node, name) for node in traced.nodes) for name in names}
        graph.ranks.append({"rank": traced.rank, **traced.place, **totals, **traced.memory})
        seen: Counter[Any] = Counter()
        for part in traced.participations:
            pair = _pair(part, traced.rank)
            seen[pair] += 1
            joined.setdefault((*pair, seen[pair]), []).append((traced.rank, part))
    for number, (key, parts) in enumerate(joined.items()):
        graph.collectives.append(_collective(f"c{number}", key, parts))
    return graph


def _pair(part: Participation, rank: int) -> tuple[Any, ...]:
    """What the ranks of a collective agree on."""
    if part.peer is None:
        return part.node.group, part.ranks
    ends = (rank, part.peer) if part.node.op == MESSAGE else (part.peer, rank)
    return part.node.group, ends, MESSAGE


def _collective(name: str, key: Any, parts: list[tuple[int, Participation]]) -> Collective:
    ranks = key[1]
    parts = sorted(parts, key=lambda part: ranks.index(part[0]))
    kinds = {MESSAGE if part.peer is not None else part.node.op for _, part in parts}
    return Collective(
        id=name,
        kind=" or ".join(sorted(kinds)),
        group=key[0],
        purpose=parts[0][1].node.purpose,
        ranks=tuple(ranks),
        members=tuple(part.node.id for _, part in parts),
        sent_bytes=sum(part.node.sent_bytes for _, part in parts),
    )


# ------------------------------------------------------------------------------- views


def attention_view(graph: Graph, layer: int = 0) -> Graph:
    """Norm, attention and residual of one layer, on all ranks that have it."""
    return view(graph, ATTENTION.format(layer), _half(graph, layer, "attention"))


def mlp_view(graph: Graph, layer: int = 0) -> Graph:
    """Norm, MLP (or experts) and residual of one layer."""
    return view(graph, MLP.format(layer), _half(graph, layer, "mlp"))


def view(graph: Graph, name: str, kept: dict[str, Node]) -> Graph:
    """Some nodes by id, and an input node for each tensor that comes from outside of them."""
    outside: dict[str, list[Node]] = {}  # by the first node that reads them
    borders: set[str] = set()
    edges = []
    for edge in graph.edges:
        if edge.target not in kept:
            continue
        if edge.source in kept:
            edges.append(edge)
            continue
        border = f"{edge.source}:{edge.output}"
        if border not in borders:
            borders.add(border)
            made = _border(border, graph.node[edge.source], edge.output, kept[edge.target])
            outside.setdefault(edge.target, []).append(made)
        edges.append(Edge(border, 0, edge.target, edge.input))
    nodes = [node for own in kept.values() for node in (*outside.get(own.id, ()), own)]
    return Graph(
        name,
        graph.settings,
        graph.ranks,
        nodes,
        edges,
        [one for one in graph.collectives if kept.keys() >= set(one.members)],
        [weight for weight in graph.weights if weight.node in kept],
    )


def _border(name: str, origin: Node, output: int, reader: Node) -> Node:
    """An input that stands for a node outside of the view."""
    inside = origin.kind in SOURCES
    return Node(
        name,
        origin.kind if inside else INPUT,
        origin.op if inside else f"from {origin.module}",
        origin.module if inside else reader.module,
        origin.ranks,
        reader.phase,
        outputs=(origin.outputs[output],),
        micro_batch=reader.micro_batch,
    )


def _half(graph: Graph, layer: int, wanted: str) -> dict[str, Node]:
    """The nodes of a layer that are `attention` or `mlp`.

    What the layer itself runs, residual additions, belongs to the half that it follows.
    """
    path = f"decoder.layers.{layer}"
    found: dict[str, Node] = {}
    now: dict[tuple[int, str, int], str] = {}
    for node in graph.nodes:
        if node.phase not in (FORWARD, BACKWARD) or not f"{node.module}.".startswith(f"{path}."):
            continue
        place = (node.rank, node.phase, node.micro_batch)
        if node.module == path:
            half = now.get(place, "attention" if node.phase == FORWARD else "mlp")
        else:
            part = node.module.removeprefix(f"{path}.").split(".")[0]
            half = "mlp" if part in ("pre_mlp_layernorm", "mlp") else "attention"
            if node.kind not in SOURCES:
                now[place] = half
        if half == wanted:
            found[node.id] = node
    return found
