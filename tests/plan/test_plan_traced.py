"""The planner against the code that runs: bytes that collectives send, and memory, traced at full size on fake
tensors. The paper's model: hidden 8192, 16 heads of 512, FFN 32768, 10000 tokens, 16 ranks."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import pytest

from helix_megatron.attention_rates import CPU_KERNEL
from helix_megatron.bench.traffic_layer import Layer
from helix_megatron.core.exchanges import EXACT
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.launch_commands import layout_words, model_words
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.memory import training_memory
from helix_megatron.plan.models import ModelSpec, model_of, spec_of_flags
from helix_megatron.plan.presets import PRESETS
from helix_megatron.plan.score import predict_training
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.traffic import added, layer_traffic

IN_FULL_TIER = functools.partial(pytest.param, marks=pytest.mark.full("graph"))
RANKS, TOKENS = 16, 10000
CLUSTER = CLUSTERS["dgx-h100"]
# What runs on a CPU: Megatron's unfused modules, a fused attention kernel for heads of any width.
TRACED = Software(local_modules=True, kernel=CPU_KERNEL, distributed_optimizer=False)


def one_layer(kv_heads: int):
    return model_of(
        "--num-layers 1 --hidden-size 8192 --ffn-hidden-size 32768 --num-attention-heads 16 --vocab-size 51200 "
        f"--group-query-attention --num-query-groups {kv_heads} --position-embedding-type none "
        "--disable-bias-linear"
    )


def layer_cases(segments: int, kv_heads: int, sequence_parallel: bool):
    """(layer to trace, [(exchange, micro-batch)]) of every exchange that fits."""
    layer = Layer(8192, 16, kv_heads, 32768, RANKS, segments, TOKENS, sequence_parallel)
    cases = [(e.name, segments if e.name == "all-to-all-batch" else 1) for e in EXACT]
    return layer, [c for c in cases if not _refusal(layer, *c)]


def _refusal(layer: Layer, exchange: str, batch: int) -> str:
    chosen = next(e for e in EXACT if e.name == exchange)
    return chosen.supports(layer.shape(exchange, batch))


@pytest.mark.parametrize(
    ("segments", "kv_heads", "sequence_parallel"),
    [
        (2, 16, True),
        IN_FULL_TIER(4, 16, True),
        IN_FULL_TIER(8, 16, True),
        (16, 16, True),
        (4, 4, True),
        (4, 16, False),
    ],
)
def test_predicted_bytes_equal_traced_ones(segments, kv_heads, sequence_parallel):
    """Every layout of 16 ranks, every exchange that fits it, forward and backward: not a byte apart."""
    from helix_megatron.bench.traffic_trace import trace

    layer, cases = layer_cases(segments, kv_heads, sequence_parallel)
    assert len(cases) >= 2
    scenario = Scenario(one_layer(kv_heads), Job("train", TOKENS, 1), CLUSTER, Software())
    for (exchange, batch), traced in zip(cases, trace(layer, cases, 0), strict=True):
        queries = layer.shape(exchange, batch).layout.query_layout
        layout = Layout(tp=RANKS, segments=segments, query_layout=queries, exchange=exchange)
        layout = layout._replace(micro_batch=batch, sequence_parallel=sequence_parallel)
        rows = added(layer_traffic(scenario, layout, 1))
        exchanged = sum(row.bytes for row in rows if row.axis == "exchange")
        others = sum(row.bytes for row in rows if row.axis == "tp")
        assert (exchanged, others) == traced, exchange


def traced_step(words: str, rank: int, gpus: int, micro_batches: int):
    """(bytes by axis and kind, memory) of one rank in a training step."""
    from helix_megatron.core.meter import measure
    from helix_megatron.graph.flags import parse
    from helix_megatron.graph.trace import trace

    args = parse([*words.split(), "--global-batch-size", str(micro_batches)], "test", gpus)
    with measure() as meter:
        traced = next(iter(trace(args, [rank], backward=True, micro_batches=micro_batches)))
    found: Counter[tuple[str, str]] = Counter()
    for (group, kind), traffic in meter.traffic.items():
        axis = next((name for start, name in AXES.items() if group.startswith(start)), "")
        if axis:  # the default group is where ranks find each other
            found[axis, "" if axis == "exchange" else kind] += traffic.bytes
    return {key: sent for key, sent in found.items() if sent}, traced.memory


AXES = {
    "TENSOR": "tp",
    "EXPERT_MODEL": "ep",
    "EXPERT_TENSOR_AND_MODEL": "ep",
    "EXPERT_DATA": "dp",
    "PIPELINE": "pp",
    "exchange": "exchange",
    "EMBEDDING": "embedding",
}


def check_step(
    model: ModelSpec,
    layout: Layout,
    words: str,
    stage: int = 0,
    sequence: int = TOKENS,
) -> None:
    """Bytes of every collective of a step are equal, embedding, output and loss included; weights and gradients
    are equal; the peak is within 3 %, with selective recomputation 5 %."""
    batches = layout.pp
    sent, memory = traced_step(words, stage * layout.tp, layout.gpus, batches)
    job = Job("train", sequence, batches)
    software = dataclasses.replace(
        TRACED,
        # Megatron's own local attention writes its scores.
        kernel=CPU_KERNEL if layout.segments > 1 else "unfused",
    )
    found: Counter[tuple[str, str]] = Counter()
    for row in predict_training(Scenario(model, job, CLUSTER, software), layout, stage).traffic:
        axis = "exchange" if row.axis == "qkv" else row.axis  # QK norms sum over the same group
        found[axis, "" if axis == "exchange" else row.kind] += row.bytes
    # Once, before the first step, tied embeddings are made equal in 16 bits; their gradients are in 32.
    tied = found.pop(("pp", "all-reduce"), 0.0)
    assert sent.pop(("embedding", "all-reduce"), 0) == 1.5 * tied
    assert {key: n for key, n in found.items() if n} == sent

    predicted = training_memory(model, layout, job, software, stage)
    assert predicted.weights == memory["parameters"]
    assert predicted.gradients == memory["gradients"]
    peak = predicted.weights + predicted.gradients + predicted.activations
    apart = 0.05 if layout.recompute == "selective" else 0.03
    assert peak == pytest.approx(memory["traced_peak"], rel=apart)


def cut(layout: Layout) -> Layout:
    """With sequence parallelism, and for several segments the exchange that is the usual choice."""
    layout = layout._replace(sequence_parallel=layout.tp > 1)
    if layout.segments == 1:
        return layout
    return layout._replace(query_layout="heads", exchange="gather-kv")


@pytest.mark.parametrize(
    ("tp", "pp", "segments"),
    [
        (case if case in {(16, 1, 1), (16, 1, 16), (8, 2, 2), (4, 4, 4)} else IN_FULL_TIER(*case))
        for case in [(16 // pp, pp, m) for pp in (1, 2, 4) for m in (1, 2, 4, 8, 16)]
        if case[2] <= case[0]
    ],
)
def test_every_layout_of_16_ranks_is_predicted(tp, pp, segments):
    """The paper's model at full size, first and last pipeline stage: TP × PP and all m × n."""
    layout = cut(Layout(tp=tp, pp=pp, segments=segments))
    words = (
        f"--preset paper-dense --vocab-size 51200 --tensor-model-parallel-size {tp} "
        f"--pipeline-model-parallel-size {pp} --intra-head-parallel-size {segments}"
    )
    for stage in {0, pp - 1}:
        check_step(model_of("paper-dense"), layout, words, stage)


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("llama-3-70b", Layout(tp=16, segments=2, recompute="full")),
        IN_FULL_TIER("llama-3-70b", Layout(tp=16, segments=4)),
        IN_FULL_TIER("qwen3-32b", Layout(tp=16, segments=2)),
        ("qwen3-32b", Layout(tp=16, segments=2, recompute="selective")),
        ("mixtral-8x7b", Layout(tp=16, segments=2, ep=8)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.describe()} {value.recompute}",
)
def test_published_models_are_predicted(preset, layout):
    """Grouped queries, gated MLPs, RMS norms, QK norms, experts, recomputation: 4 layers each, full width."""
    model = spec_of_flags(preset, PRESETS[preset][0] | {"num_layers": 4}, "test")
    layout, job = cut(layout), Job("train", 8192, 1)
    flags = [*model_words(model), *layout_words(model, layout, job, Software())]
    left = {"--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"}
    at = flags.index("--global-batch-size")
    words = " ".join(word for word in flags[:at] + flags[at + 2 :] if word not in left)
    check_step(model, layout, words, sequence=8192)
