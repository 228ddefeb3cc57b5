"""Small runs whose operator graphs the tests look at."""

from __future__ import annotations

import copy
import functools
import warnings

from helix_megatron.graph.model import Graph, Node

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --micro-batch-size 2 --bf16"
HELIX = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"
SEGMENTS = f"{HELIX} --helix-query-layout segments"
BASELINE = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
EXPERTS = f"{HELIX} --num-layers 1 --num-experts 4 --disable-bias-linear"
DEALT_EXPERTS = f"{HELIX} --num-layers 1 --num-experts 4 --expert-model-parallel-size 4"
LOCAL = f"{HELIX} --num-layers 1 --helix-attention segment-local"
PLAIN = (
    "--tensor-model-parallel-size 2 --num-layers 1 --untie-embeddings-and-output-weights --swiglu"
)


def flags(run: str) -> list[str]:
    """Command-line flags of a small model in that layout."""
    return [*MODEL.split(), *run.split()]


@functools.cache
def _traced(run: str, backward: bool, micro_batches: int) -> Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of packages
        from helix_megatron.graph.build import build
        from helix_megatron.graph.flags import parse

        args = parse(flags(run), "helix graph")
        return build(args, backward=backward, micro_batches=micro_batches)


def traced(run: str = HELIX, *, backward: bool = True, micro_batches: int = 1) -> Graph:
    """The graph of a small run; a copy, to be changed at will."""
    return copy.deepcopy(_traced(run, backward, micro_batches))


def forward(graph: Graph, rank: int, op: str, module: str = "") -> list[Node]:
    """A rank's forward nodes with that operator, below a module."""
    return [
        node
        for node in graph.of_rank(rank)
        if node.op == op and node.module.startswith(module) and node.phase == "forward"
    ]
