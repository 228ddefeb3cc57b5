"""The operators of one transformer layer, of the embedding and of the output, on one rank, per micro-batch.

They are those of megatron-core's GPT: column- and row-parallel linears, sequence parallel norms, all-to-all or
replicated experts; and of Helix's attention, whose exchange states its own bytes and FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from helix_megatron.attention_rates import kernel_that_runs
from helix_megatron.core.exchanges import COSTS, NO_EXCHANGE, AttentionShape
from helix_megatron.hardware import ATTENTION_BACKWARD_FLOPS, LINEAR_SHARE
from helix_megatron.plan.collective_time import Group
from helix_megatron.plan.layouts import Layout, attention_shape, strip
from helix_megatron.plan.mixers import Linear
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.roofline import AttentionWork, attention_seconds, stream_seconds
from helix_megatron.plan.settings import Scenario, Software
from helix_megatron.plan.steps import BACKWARD, FORWARD, LayerRecorder, Recorder, Step


class LayerKind(NamedTuple):
    """Layers that are alike. mixer: attention, window (attention with a sliding window), linear, beside (linear
    attention next to attention) or none; mlp: dense, experts or none."""

    mixer: str
    mlp: str
    layers: int

    def name(self, model: ModelSpec) -> str:
        """As reports call it: `dense`, `MoE with window`, `MoE, gated delta net`, `Mamba 2`."""
        linear = model.special.linear.name if model.special.linear else ""
        if self.mlp == "none":
            return linear if self.mixer == "linear" else "attention"
        mixers = {"window": " with window", "linear": f", {linear}"}
        mixers["beside"] = f", {linear} beside attention"
        return ("MoE" if self.mlp == "experts" else "dense") + mixers.get(self.mixer, "")


@functools.lru_cache(maxsize=64)
def layer_kinds(model: ModelSpec) -> tuple[LayerKind, ...]:
    """The kinds of the model's layers; windows and linear attention are taken to be spread evenly."""
    linear = model.special.linear_layers
    mixers = {"window": model.windows, "beside" if model.special.beside else "linear": linear}
    mlps = {"dense": model.dense_layers, "experts": model.expert_layers}
    if model.special.separate:
        mixers["attention"] = model.attention_layers - model.windows
        kinds = [LayerKind(mixer, "none", count) for mixer, count in mixers.items()]
        kinds += [LayerKind("none", mlp, count) for mlp, count in mlps.items()]
        return tuple(kind for kind in kinds if kind.layers)
    kinds = []
    for mlp, count in mlps.items():
        rest = count
        for mixer, many in mixers.items():
            own = min(rest, round(count * many / model.num_layers))
            kinds.append(LayerKind(mixer, mlp, own))
            rest -= own
        kinds.append(LayerKind("attention", mlp, rest))
    return tuple(kind for kind in kinds if kind.layers)


def layer_steps(scenario: Scenario, layout: Layout, kind: LayerKind) -> tuple[Step, ...]:
    """One layer, forward and backward, without recomputation."""
    mixer = mixer_steps(scenario, attention_part(layout), kind.mixer)
    return mixer + mlp_steps(scenario, mlp_part(layout), kind.mlp)


def mixer_steps(scenario: Scenario, layout: Layout, mixer: str) -> tuple[Step, ...]:
    """What a layer has before its MLP: attention, or linear attention, or nothing."""
    if mixer == "none":
        return ()
    if mixer == "linear":
        return linear_steps(scenario, layout)
    if mixer == "window":
        scenario = scenario._replace(model=scenario.model.local_model)
    if scenario.model.special.latent:
        return latent_steps(scenario, layout)
    beside = linear_steps(scenario, layout) if mixer == "beside" else ()
    return attention_steps(scenario, layout, mixer == "window") + beside


@functools.lru_cache(maxsize=65536)
def attention_part(layout: Layout) -> Layout:
    """The layout without what attention does not depend on, so that its steps are found again."""
    return strip(layout)._replace(ep=1, etp=1)


@functools.lru_cache(maxsize=65536)
def mlp_part(layout: Layout) -> Layout:
    """The layout without what the MLP does not depend on."""
    return strip(layout)._replace(segments=1, query_layout="segments", exchange=NO_EXCHANGE.name)


@functools.lru_cache(maxsize=8192)
def attention_steps(scenario: Scenario, layout: Layout, windowed: bool) -> tuple[Step, ...]:
    """Norm, projections and core attention of one layer."""
    record, model = LayerRecorder(scenario, layout), scenario.model
    tokens, tp = record.tokens, layout.tp
    hidden, width = model.hidden_size, model.width
    record.norm("input norm")
    record.column_parallel("linear_qkv", tokens, model.qkv_rows / tp, hidden)
    if layout.segments == 1 and tp > model.num_query_groups:
        # Stock megatron-core with more ranks than key-value heads: everyone gets everything, keeps its part.
        size = tokens * model.qkv_rows * record.element
        for phase, kind in ((FORWARD, "all-gather"), (BACKWARD, "reduce-scatter")):
            record.collective("stock QKV gather", phase, kind, size, layout.tp_group, "qkv")
    heads = model.num_attention_heads + model.num_query_groups
    turned = tokens * heads * model.head_dim / tp
    if model.rotary != "none":
        record.stream("rotary embedding", turned, 2, 2, f"[{tokens:.0f}, {heads / tp:g} heads]")
    if model.norms_queries:
        record.stream("QK norms", turned, 2, 4)
        if layout.segments > 1 and COSTS[layout.exchange].in_core:
            # Sums of squares (and sums) of heads that are still cut.
            cut = model.num_query_groups
            cut += model.num_attention_heads if layout.query_layout == "segments" else 0
            size = 4 * tokens * cut / layout.head_groups * model.norm_tensors
            name, group = "QK norm statistics", layout.head_group
            for phase in (FORWARD, BACKWARD):
                record.collective(name, phase, "all-reduce", size, group, "qkv")
    _core_attention(record, scenario.job.sequence, model.window_size if windowed else None)
    record.cast("attention output", tokens * width / tp)
    record.row_parallel("linear_proj", tokens, hidden, width / tp)
    record.residual("attention residual")
    return tuple(record.steps)


def record_shared_groups(
    record: Recorder, linear: Linear, tp: int, tokens: float, phases: Sequence[str]
) -> None:
    """What ranks exchange that have heads of one group: its keys and queries, and squares for its norm."""
    group, keys = Group(linear.sharing(tp)), 2 * tokens * linear.key * record.element
    sums = 4 * tokens * linear.normed
    for phase in phases:
        kind = "all-gather" if phase == FORWARD else "reduce-scatter"
        record.collective("shared group", phase, kind, keys, group, "tp")
        record.collective("norm of a shared group", phase, "all-reduce", sums, group, "tp")


@functools.lru_cache(maxsize=8192)
def linear_steps(scenario: Scenario, layout: Layout) -> tuple[Step, ...]:
    """Norm, projections, convolution and scan of a layer of linear attention, cut by its own heads."""
    special = scenario.model.special
    linear = special.linear
    assert linear is not None, "a model without linear attention"
    if linear.ranks(layout.tp) == 1:
        layout = layout._replace(tp=1, sequence_parallel=False)
    record, tp, hidden = LayerRecorder(scenario, layout), layout.tp, scenario.model.hidden_size
    tokens = record.tokens
    if not special.beside:
        record.norm("input norm")
    record.column_parallel("linear_in", tokens, linear.rows / tp, hidden)
    record_shared_groups(record, linear, tp, tokens, (FORWARD, BACKWARD))
    record.stream("convolution", tokens * linear.channels / tp, 2, 4)
    peak = record.chip.flops[record.software.unquantised] * LINEAR_SHARE
    flops = tokens * linear.scan_flops / tp
    moved = 2 * tokens * (linear.rows + linear.columns) / tp * record.element
    least = stream_seconds(record.chip, moved)
    seconds = max(flops / peak, least), max(2 * flops / peak, 2 * least)
    text = f"[{linear.heads / tp:g} heads of {linear.key} × {linear.value}], {linear.name}"
    record.attention(text, flops, moved, seconds, 2.0)
    record.row_parallel("linear_out", tokens, hidden, linear.columns / tp)
    if not special.beside:
        record.residual("attention residual")
    return tuple(record.steps)


@functools.lru_cache(maxsize=8192)
def latent_steps(scenario: Scenario, layout: Layout) -> tuple[Step, ...]:
    """Norm, compressions, projections and core attention of latent attention: plain tensor parallelism."""
    record, model = LayerRecorder(scenario, layout), scenario.model
    latent, heads, tokens = (
        model.special.latent,
        model.num_attention_heads / layout.tp,
        record.tokens,
    )
    assert latent is not None, "a model without latent attention"
    hidden, rank = model.hidden_size, latent.query_rank
    record.norm("input norm")
    # The compressions are on every rank, over its own tokens where sequence parallelism deals them out.
    record.gemm("linear_down", record.own, rank + latent.cached, hidden)
    record.stream("norms of latents", record.own * (rank + latent.kv_rank), 2, 4)
    if rank:
        record.column_parallel("linear_q_up", tokens, heads * latent.key, rank)
    else:
        record.column_parallel("linear_q", tokens, heads * latent.key, hidden)
    record.column_parallel(
        "linear_kv_up", tokens, heads * (latent.nope + latent.value), latent.kv_rank
    )
    record.stream("rotary embedding", 2 * tokens * heads * latent.key, 2, 2)
    queries = scenario.job.sequence / layout.cp
    kernel = kernel_that_runs(
        record.chip,
        latent.key,
        grouped=False,
        training=scenario.job.task == "train",
        asked=record.software.kernel,
    )
    work = AttentionWork(
        flops=model.attended(scenario.job.sequence) / layout.tp * tokens,
        batch_heads=layout.micro_batch * heads,
        queries=queries,
        keys=scenario.job.sequence,
        head_dim=latent.key,
        grouped=False,
        positions=queries,
        kernel=kernel,
    )
    precision = record.software.unquantised
    seconds = attention_seconds(record.chip, work, precision=precision)
    text = (
        f"[{layout.micro_batch}, {heads:g} heads, {scenario.job.sequence}, {latent.key}], {kernel}"
    )
    moved = tokens * heads * 2 * (latent.key + latent.value) * record.element
    times = ATTENTION_BACKWARD_FLOPS if work.fused else 2.0
    record.attention(text, work.flops, moved, seconds, times)
    record.row_parallel("linear_proj", tokens, hidden, heads * latent.value)
    record.residual("attention residual")
    return tuple(record.steps)


@functools.lru_cache(maxsize=8192)
def mlp_steps(scenario: Scenario, layout: Layout, mlp: str) -> tuple[Step, ...]:
    """Norm and MLP, dense or of experts, of one layer; nothing where it has none."""
    record = LayerRecorder(scenario, layout)
    if mlp != "none":
        (record.experts_mlp if mlp == "experts" else record.mlp)()
    return tuple(record.steps)


def _core_attention(record: LayerRecorder, sequence: int, window: int | None) -> None:
    model, layout, software = record.model, record.layout, record.software
    shape = attention_shape(model, layout, sequence, record.element, window)
    cost = COSTS[layout.exchange]
    assert not cost.supports(shape), f"{cost.name}: {cost.supports(shape)}"
    work = attention_work(record.scenario, layout, shape)
    precision = software.unquantised
    seconds = attention_seconds(record.chip, work, dropout=software.dropout, precision=precision)
    sent = cost.bytes(shape)
    size = sent * layout.segments / max(1, layout.segments - 1)
    size /= 2 if cost.collective == "all-reduce" else 1
    counted = {"sent": sent, "messages": cost.messages(shape)}
    name, group = f"exchange {cost.name}", layout.head_group
    for phase in (FORWARD, BACKWARD):
        record.collective(name, phase, cost.collective, size, group, "exchange", **counted)
    if layout.cp > 1:
        # Keys and values travel round a ring of context parallel ranks beside the computation, and every turn's
        # partial output is merged in fp32.
        merged = 2 * (layout.cp - 1) * work.batch_heads * work.queries * work.head_dim
        record.stream("context parallel merge", merged, 3, 3)
        kv = 2 * model.num_query_groups * model.head_dim / min(layout.tp, model.num_query_groups)
        size = layout.micro_batch * sequence * kv * record.element
        name, group = "context parallel keys and values", layout.cp_group
        for phase, many, busy in zip((FORWARD, BACKWARD), (1, 2), seconds, strict=True):
            beside = busy * (layout.cp - 1) / layout.cp
            record.collective(name, phase, "all-gather", many * size, group, "cp", beside=beside)
    heads = work.batch_heads / layout.micro_batch
    text = f"[{layout.micro_batch}, {heads:g} heads, {sequence}, {work.head_dim}], {work.kernel}"
    times = ATTENTION_BACKWARD_FLOPS if work.fused else 2.0
    moved = _attention_bytes(work, model, software)
    record.attention(text, work.flops, moved, seconds, times)


def _attention_bytes(work: AttentionWork, model: ModelSpec, software: Software) -> float:
    """Bytes that core attention reads and writes forward: queries, keys, values and output once; and scores
    where no fused kernel keeps them on the chip."""
    shared = model.num_attention_heads // model.num_query_groups
    kv_heads = max(1.0, work.batch_heads / shared)
    ends = 2 * work.batch_heads * work.queries + 2 * kv_heads * work.keys
    scores = work.score_bytes
    if not work.fused and not scores:
        # Written and read.
        element = 4 if work.kernel == "math" else software.element
        scores = 2 * element * work.batch_heads * work.queries * work.keys
    return ends * work.head_dim * software.element + scores


def attention_work(scenario: Scenario, layout: Layout, shape: AttentionShape) -> AttentionWork:
    """What is left to compute on one rank, as the exchange states it."""
    model, cost = scenario.model, COSTS[layout.exchange]
    local = cost.local_heads(shape.layout)
    window = shape.window[0] if shape.window is not None else shape.key_length
    return AttentionWork(
        flops=cost.flops(shape) / layout.cp,
        batch_heads=max(1.0, shape.batch * local.heads),
        queries=shape.query_length / layout.cp,
        keys=shape.key_length,
        head_dim=local.query_dim,
        grouped=model.num_query_groups < model.num_attention_heads,
        positions=min(shape.key_length / layout.cp, max(window, 128)),
        score_bytes=cost.score_bytes(shape),
        kernel=attention_kernel(scenario, layout, local.query_dim),
    )


def attention_kernel(scenario: Scenario, layout: Layout, dims: int) -> str:
    """The kernel of core attention over heads of so many dimensions."""
    model, job, cluster, software = scenario
    capped = job.task == "train" and model.attn_logit_softcapping is not None
    if capped and cluster.chip.family != "cpu":
        return "math"  # no fused kernel: scores are written and read in fp32
    return kernel_that_runs(
        cluster.chip,
        dims,
        grouped=model.num_query_groups < model.num_attention_heads,
        training=job.task == "train",
        asked=software.kernel,
        exchange=layout.exchange,
    )


@functools.lru_cache(maxsize=4096)
def outer_steps(scenario: Scenario, layout: Layout, *, first: bool) -> tuple[Step, ...]:
    """The embedding (`first`), or the final norm, the output layer and the loss, per micro-batch."""
    model, software = scenario.model, scenario.software
    software = dataclasses.replace(software, precision=software.unquantised)
    record = LayerRecorder(scenario._replace(software=software), layout)
    tokens, hidden = record.tokens, model.hidden_size
    group, size = layout.tp_group, tokens * hidden * record.element
    if first:
        record.stream("embedding", tokens * hidden, 2, 2, f"[{tokens:.0f}, {hidden}]")
        kind = "reduce-scatter" if layout.sequence_parallel else "all-reduce"
        record.collective("embedding output", FORWARD, kind, size, group, "tp")
        if layout.sequence_parallel:
            record.collective("embedding gradient", BACKWARD, "all-gather", size, group, "tp")
        return tuple(record.steps)
    vocab = model.padded_vocab(layout.tp) / layout.tp
    record.norm("final norm")
    record.column_parallel("output_layer", tokens, vocab, hidden)
    # Logits become fp32; maximum, exponential, sum and the gradient read and write them again.
    record.stream("cross entropy", tokens * vocab, 10, 6, f"[{tokens:.0f}, {vocab:.0f}]")
    record.collective("loss", FORWARD, "all-reduce", 3 * 4 * tokens, group, "tp", messages=3)
    return tuple(record.steps)
