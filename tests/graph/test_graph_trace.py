"""The operator graph is what runs: operators, shapes, collectives and memory of a traced rank."""

from __future__ import annotations

import itertools
import os
import signal
import warnings
from collections import Counter

import pytest
import torch
from graph_runs import (
    BASELINE,
    CONTEXT,
    DEALT_EXPERTS,
    EXPERTS,
    HELIX,
    SEGMENTS,
    flags,
    forward,
    of_rank,
    traced,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_megatron.core.exchanges import EXACT, choose
from helix_megatron.errors import HelixError
from helix_megatron.graph import trace as tracing
from helix_megatron.graph import values
from helix_megatron.graph.build import attention_view, mlp_view
from helix_megatron.graph.flags import parse
from helix_megatron.graph.fold import rank_classes
from helix_megatron.graph.model import COLLECTIVE, PARAMETER, Spec
from helix_megatron.graph.recorder import Recorder
from helix_megatron.hardware import GPU


def real_traffic(argv: list[str]) -> dict[str, int]:
    """One forward and backward pass on this rank of a real process group: purpose → bytes that it sent."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from helix_megatron import parallel_state
    from helix_megatron.core.meter import measure
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.loop import masked_mean
    from helix_megatron.training.pretrain import build

    warnings.simplefilter("ignore")
    run = parse(argv, "test")
    cpu_runtime.install()
    config, chunks = build(run)
    config.finalize_model_grads_func = finalize_model_grads
    length = run.model.seq_length // run.parallel.context_parallel_size
    tokens = torch.arange(length).repeat(run.training.micro_batch_size, 1)

    def forward_step(_, model):
        losses = model(tokens, tokens, None, labels=tokens)
        mask = torch.ones(tokens.shape)
        return losses, lambda out: masked_mean(out, mask, mask.sum())

    with measure() as meter:
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=itertools.repeat(0),
            model=chunks[0],
            num_microbatches=1,
            seq_length=run.model.seq_length,
            micro_batch_size=run.training.micro_batch_size,
            forward_only=False,
        )
    sent: Counter[str] = Counter()
    for (purpose, _), traffic in meter.traffic.items():
        sent[purpose] += traffic.bytes
    parallel_state.destroy_model_parallel()
    return {purpose: number for purpose, number in sent.items() if number}


@pytest.mark.parametrize("run", [HELIX, BASELINE, CONTEXT], ids=["helix", "baseline", "context"])
def test_traced_collectives_are_those_that_really_run(pool, run):
    """The graph claims to be what runs: the same bytes, for the same purposes, as on real ranks."""
    real = pool.run(real_traffic, flags(run), world_size=4)
    graph = traced(run)
    for rank, sent in enumerate(real):
        recorded: Counter[str] = Counter()
        for node in of_rank(graph, rank):
            if node.sent_bytes:
                recorded[node.purpose] += node.sent_bytes
        assert recorded == sent, f"rank {rank}"
    assert sum(map(len, real)) >= 8


@pytest.mark.parametrize(
    "run", [SEGMENTS, *(f"{HELIX} --num-layers 1 --helix-exchange {e.name}" for e in EXACT)]
)
def test_exchange_bytes_are_the_formula_of_the_exchange(run):
    """The cost model and the graph must not disagree about what attention exchanges."""
    settings = parse(flags(run), "test")
    shape = settings.attention_shape
    formula = choose(shape, settings.helix.exchange, GPU).bytes(shape)
    graph = traced(run, backward=False)
    for rank in range(4):
        sent = [n.sent_bytes for n in of_rank(graph, rank) if n.purpose.startswith("exchange")]
        assert sum(sent) == settings.model.num_layers * formula > 0


def test_flops_are_those_of_the_matrices():
    """FLOPs of a pass follow from the model's sizes; a missing or double operator would show."""
    graph = traced(HELIX)
    hidden, ffn, vocabulary, tokens, layers = 64, 256, 256, 32, 2
    matrices = layers * (4 * hidden * hidden + 2 * hidden * ffn) + hidden * vocabulary
    pairs = 16 * 17 // 2  # causal
    attention = layers * 2 * 2 * 4 * pairs * (16 + 16)  # batch, multiply-adds, heads, head dims
    for phase, (products, attentions) in (("forward", (1, 1)), ("backward", (2, 2.5))):
        flops = sum(node.flops for node in graph.nodes if node.phase == phase)
        assert flops == products * 2 * tokens * matrices + attentions * attention, phase


def test_modules_phases_and_shapes():
    """Nodes are found under the module that runs them, in forward and in backward, with local shapes."""
    graph = traced(HELIX)
    (product,) = forward(graph, 3, "aten.mm", "decoder.layers.1.mlp.linear_fc1")
    assert product.inputs == (Spec((32, 64), "bf16"), Spec((64, 64), "bf16"))
    assert product.outputs == (Spec((32, 64), "bf16"),)
    assert product.bytes == 2 * 3 * 32 * 64 + 2 * (64 * 64 - 32 * 64)
    backward = [n for n in of_rank(graph, 3) if (n.module, n.phase) == (product.module, "backward")]
    assert sum(node.op == "aten.mm" for node in backward) == 2
    assert any(node.op == "all-gather" and node.kind == COLLECTIVE for node in backward)
    parts = {node.module.split(".")[0] for node in of_rank(graph, 0) if node.kind != PARAMETER}
    assert {"decoder", "embedding", "output_layer", "loss"} <= parts
    assert {node.phase for node in graph.nodes} == {"forward", "backward", "gradients"}


def test_pipeline_stages_number_layers_of_the_whole_model():
    """Layer 1 is on the second stage, and must not be called layer 0 there."""
    graph = traced(BASELINE)
    layers = {rank: set() for rank in range(4)}
    for node in graph.nodes:
        parts = node.module.split(".")
        if parts[:2] == ["decoder", "layers"]:
            layers[node.rank].add(int(parts[2]))
    assert layers == {0: {0}, 1: {0}, 2: {1}, 3: {1}}
    messages = [one for one in graph.collectives if one.kind == "send"]
    assert sorted(one.ranks for one in messages) == [(0, 2), (1, 3), (2, 0), (3, 1)]


def test_micro_batches_are_told_apart():
    """Two micro-batches are two passes through every layer."""
    once, twice = traced(BASELINE), traced(BASELINE, micro_batches=2)
    for number in (0, 1):
        nodes = [n for n in twice.nodes if n.micro_batch == number and "linear_qkv" in n.module]
        first = [n for n in once.nodes if "linear_qkv" in n.module and n.kind != PARAMETER]
        assert Counter(n.op for n in nodes if n.kind != PARAMETER) == Counter(n.op for n in first)


def test_experts_are_routed_in_turn():
    """Shapes behind a router depend on data; traced, every expert gets its even share."""
    graph = traced(EXPERTS, backward=False)
    for expert in range(4):
        path = f"decoder.layers.0.mlp.experts.local_experts.{expert}.linear_fc1"
        (product,) = forward(graph, 0, "aten.mm", path)
        assert product.inputs[0].shape == (32 * 2 // 4, 64)
    dealt = traced(DEALT_EXPERTS, backward=False)
    swaps = [
        n for n in forward(dealt, 2, "all-to-all", "decoder.layers.0.mlp") if n.inputs[0].numel > 16
    ]
    assert [node.outputs[0].shape for node in swaps] == [(16, 64), (16, 64)]


def test_equal_ranks_are_folded_and_unequal_ones_are_not():
    """Folding must not hide a difference: pipeline stages differ, tensor parallel ranks do not."""
    assert [one.ranks for one in rank_classes(traced(HELIX))] == [[0, 1, 2, 3]]
    assert [one.ranks for one in rank_classes(traced(BASELINE))] == [[0, 1], [2, 3]]
    # Traced one after the other in one process, ranks must not see what an earlier one left behind.
    assert [one.ranks for one in rank_classes(traced(DEALT_EXPERTS))] == [[0, 1, 2, 3]]
    graph = traced(HELIX)
    (product,) = forward(graph, 2, "aten.mm", "decoder.layers.1.mlp.linear_fc1")
    product.outputs = (Spec((31, 64), "bf16"),)
    assert [one.ranks for one in rank_classes(graph)] == [[0, 1, 3], [2]]


def test_views_hold_one_half_of_a_layer():
    """Attention and MLP share a layer: no operator in both, and all of the layer's in one of them."""
    graph = traced(HELIX)
    attention, mlp = attention_view(graph, 1), mlp_view(graph, 1)
    ids = [{node.id for node in view.nodes if ":" not in node.id} for view in (attention, mlp)]
    assert not ids[0] & ids[1]
    nodes = [n for n in graph.nodes if n.module.startswith("decoder.layers.1")]
    assert {n.id for n in nodes if n.phase in ("forward", "backward")} == ids[0] | ids[1]
    assert len(forward(attention, 0, "aten.add.Tensor", "decoder.layers.1")) > 0
    purposes = {one.purpose.split("/")[0] for one in attention.collectives}
    assert purposes == {"exchange", "TENSOR_MODEL_PARALLEL_GROUP"}
    for view in (attention, mlp):
        assert all(edge.source in view.node and edge.target in view.node for edge in view.edges)


def test_a_killed_process_is_reported(monkeypatch):
    """A machine without memory kills processes; waiting for their results would take for ever."""
    monkeypatch.setattr(tracing, "trace", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(HelixError, match=r"one of the 2 processes .* was killed.* Try --jobs 1"):
        tracing.trace_all(parse(flags(HELIX), "test"), jobs=2)


# ----------------------------------------------------------------------- the recorder alone


def record(function) -> Recorder:
    """Record a function of no arguments, on fake tensors."""
    recorder = Recorder(0)
    with FakeTensorMode(), recorder:
        function()
    return recorder


def test_a_tensor_written_through_a_view_comes_from_the_writer():
    """Collectives fill flat views of their output: whoever reads the output depends on the collective."""

    def run():
        whole = torch.zeros(4, 8)
        flat = whole.view(-1)
        flat.add_(1)
        whole.exp()

    recorder = record(run)
    names = {node.id: node.op for node in recorder.nodes}
    sources = {names[e.target]: names[e.source] for e in recorder.edges}
    assert sources["aten.exp"] == "view of written memory"
    assert sources["view of written memory"] == "aten.add_.Tensor"
    for edge in recorder.edges:
        made = next(n for n in recorder.nodes if n.id == edge.source).outputs[edge.output]
        read = next(n for n in recorder.nodes if n.id == edge.target).inputs[edge.input]
        assert made == read


def test_a_write_beside_a_tensor_does_not_reach_it():
    """Gradients share one buffer; adding to one of them makes no other wait."""

    def run():
        buffer = torch.zeros(10)
        first, second = buffer[:5], buffer[5:]
        second.add_(1)
        first.exp()
        buffer.neg()

    recorder = record(run)
    names = {node.id: node.op for node in recorder.nodes}
    sources: dict[str, set[str]] = {}
    for edge in recorder.edges:
        sources.setdefault(names[edge.target], set()).add(names[edge.source])
    assert sources["aten.exp"] == {"aten.slice.Tensor"}
    assert sources["aten.neg"] == {"view of written memory"}
    assert sources["view of written memory"] == {"aten.zeros", "aten.add_.Tensor"}


def test_peak_memory_counts_what_is_alive_at_once():
    """Freed tensors make room; views take none."""

    def run():
        x = torch.zeros(1000)  # 4000 bytes
        y = x.view(10, 100).exp()  # 4000 more
        del x
        z = y + 1  # y and z: 8000
        del y
        torch.zeros(500)  # z and this: 6000
        del z

    recorder = record(run)
    assert recorder.storages.peak == 8000
    assert recorder.storages.live == 0


def test_memory_of_a_rank_is_what_it_holds():
    """Weights and gradient buffers are known exactly; activations are the rest, and backward keeps more."""
    graph = traced(HELIX)
    for entry in graph.ranks:
        held = sum(w.spec.numel for w in graph.weights if w.rank == entry["rank"])
        assert entry["parameters"] == 2 * held
        assert entry["gradients"] >= 4 * held
        parts = entry["parameters"] + entry["gradients"] + entry["activations"]
        assert entry["traced_peak"] == parts
    once = traced(HELIX, backward=False).ranks[0]
    assert once["activations"] > 0
    one, two = (traced(BASELINE, micro_batches=k).ranks for k in (1, 2))
    assert two[0]["activations"] > one[0]["activations"]  # two micro-batches in flight on stage 0


def test_values_that_are_not_known_are_refused():
    """A shape that depends on data must not be guessed."""
    unknown = pytest.raises(HelixError, match="result depends on the data")
    with FakeTensorMode(), Recorder(0), unknown:
        torch.rand(4).nonzero()


def test_known_values_follow_computation():
    """Counts of tokens come from the routing map, through sums, casts and views."""
    with FakeTensorMode(), Recorder(0):
        _, chosen = torch.topk(torch.rand(6, 4), 2, dim=1)
        routes = torch.zeros(6, 4, dtype=torch.int).scatter(1, chosen, 1).bool()
        counts = routes.sum(dim=0).long()
        assert counts.tolist() == [3, 3, 3, 3]
        assert torch.rand(6, 4).masked_select(routes).shape == (12,)
        counts.add_(torch.rand(4).long())
        assert values.known(counts) is None


def test_large_tables_have_no_values():
    """Rotary angles of 10000 positions could be known; keeping them took 300 MB for each rank."""
    with FakeTensorMode(), Recorder(0):
        assert values.known(torch.arange(1000, dtype=torch.float32)) is not None
        assert values.known(torch.arange(100_000)) is not None
        assert values.known(torch.arange(100_000, dtype=torch.float32)) is None
        angles = torch.outer(torch.arange(1000.0), torch.arange(100.0))
        assert angles.shape == (1000, 100) and values.known(angles) is None
