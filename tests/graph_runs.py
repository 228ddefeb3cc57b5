"""Small runs whose operator graphs the tests look at."""

from __future__ import annotations

import functools
import pickle
import warnings

from helix_megatron.graph.model import Graph, Node

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --bf16"
HELIX = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"
SEGMENTS = f"{HELIX} --helix-query-layout segments"
BASELINE = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
EXPERTS = f"{HELIX} --num-layers 1 --num-experts 4 --disable-bias-linear"
DEALT_EXPERTS = f"{HELIX} --num-layers 1 --num-experts 4 --expert-model-parallel-size 4"
LOCAL = f"{HELIX} --num-layers 1 --helix-attention segment-local"
CONTEXT = (
    "--tensor-model-parallel-size 2 --intra-head-parallel-size 2 --context-parallel-size 2 --num-layers 1 "
    "--group-query-attention --num-query-groups 2"
)
PLAIN = (
    "--tensor-model-parallel-size 2 --num-layers 1 --untie-embeddings-and-output-weights --swiglu"
)


def flags(run: str) -> list[str]:
    """Command-line flags of a small model in that layout."""
    return [*MODEL.split(), *run.split()]


@functools.cache
def _traced(run: str, backward: bool, micro_batches: int) -> bytes:
    """Pickled: some hundred tests want a copy each, and that is many times faster than copy.deepcopy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of packages
        from helix_megatron.graph.build import build
        from helix_megatron.graph.flags import parse

        args = parse(flags(run), "helix graph")
        return pickle.dumps(build(args, backward=backward, micro_batches=micro_batches))


def traced(run: str = HELIX, *, backward: bool = True, micro_batches: int = 1) -> Graph:
    """The graph of a small run; a copy, to be changed at will."""
    return pickle.loads(_traced(run, backward, micro_batches))


@functools.cache
def _ranks_of(run: str) -> bytes:
    """Pickled: (traces of the ranks, settings)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of packages
        from helix_megatron.graph.flags import parse, settings_of
        from helix_megatron.graph.trace import trace_all

        args = parse(flags(run), "helix graph")
        settings = settings_of(args) | {"backward": True, "micro_batches": 1}
        return pickle.dumps((trace_all(args, backward=True), settings))


def reordered(run: str, rank: int, first: tuple[str, str], second: tuple[str, str]) -> Graph:
    """The graph of a run, forward and backward, one of whose ranks runs `second` before `first`.

    Each is (module, kind) of a collective of the backward pass. The second must read nothing that was made
    since the first; so the rank's own program still makes everything before it reads it.
    """
    from helix_megatron.graph.build import COMPLETE, join

    traces, settings = pickle.loads(_ranks_of(run))
    traced = traces[rank]
    here, there = (_place(traced.nodes, *one) for one in (first, second))
    moved = traced.nodes[there]
    since = {node.id for node in traced.nodes[here:there]}
    assert here < there and not any(
        e.target == moved.id and e.source in since for e in traced.edges
    )
    traced.nodes.insert(here, traced.nodes.pop(there))
    order = {node.id: place for place, node in enumerate(traced.nodes)}
    traced.participations.sort(key=lambda part: order[part.node.id])
    return join(traces, COMPLETE, settings)


def _place(nodes: list[Node], module: str, kind: str) -> int:
    wanted = (module, kind, "backward")
    (found,) = [i for i, node in enumerate(nodes) if (node.module, node.op, node.phase) == wanted]
    return found


def of_rank(graph: Graph, rank: int) -> list[Node]:
    """A rank's nodes, in the order of its program."""
    return [node for node in graph.nodes if node.ranks == (rank,)]


def forward(graph: Graph, rank: int, op: str, module: str = "") -> list[Node]:
    """A rank's forward nodes with that operator, below a module."""
    nodes = [node for node in of_rank(graph, rank) if (node.op, node.phase) == (op, "forward")]
    return [node for node in nodes if node.module.startswith(module)]
