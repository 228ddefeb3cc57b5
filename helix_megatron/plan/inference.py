"""Prefill and decode: seconds until the first token, seconds of a token, and the key-value cache.

The cache layouts over the m ranks of a head group (`helix_megatron.core.caches`) state what they send and read.
None of them stores a head twice; stock megatron-core with more ranks than key-value heads does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from helix_megatron.attention_rates import WRITING, kernel_that_runs
from helix_megatron.core.caches import NAMES, DecodeShape, cache_layout
from helix_megatron.hardware import CHIPS
from helix_megatron.plan.collective_time import collective_seconds, point_to_point_seconds
from helix_megatron.plan.layouts import Layout, head_layout, strip
from helix_megatron.plan.memory import Memory, expert_weights, rank_weights
from helix_megatron.plan.mixers import Linear
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import LayerKind, layer_kinds
from helix_megatron.plan.roofline import decode_seconds, stream_seconds
from helix_megatron.plan.schedule import pipeline_seconds
from helix_megatron.plan.score import Prediction, layers_cost
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.steps import FORWARD, Recorder, Step
from helix_megatron.plan.traffic import Traffic, added, layer_traffic, traffic_of


@functools.lru_cache(maxsize=64)
def inference_software(software: Software) -> Software:
    """The same without dropout."""
    return dataclasses.replace(software, dropout=False)


def for_inference(scenario: Scenario) -> Scenario:
    """The same with `inference_software`."""
    return scenario._replace(software=inference_software(scenario.software))


def cache_bytes(
    model: ModelSpec, layout: Layout, sequences: int, context: int, element: int
) -> float:
    """Bytes of keys and values of one layer with attention on one rank."""
    if model.special.latent:  # absorbed: every rank has query heads of it
        return float(sequences * context * model.special.latent.cached * element)
    if layout.segments > 1:
        heads = head_layout(model, layout.tp, layout.segments, layout.query_layout)
        shape = DecodeShape(heads, sequences, context, element)
        if layout.cache in NAMES:
            return cache_layout(layout.cache).read_bytes(shape)
        return shape.cache_bytes() / layout.segments
    # Stock: a copy on every rank that has query heads of it.
    kv_heads = max(1.0, model.num_query_groups / layout.tp)
    return 2 * sequences * context * kv_heads * model.head_dim * element


def average_cache_bytes(
    model: ModelSpec, layout: Layout, sequences: int, context: int, element: int
) -> float:
    """Bytes of an average layer on one rank: keys and values, and what linear attention keeps of a sequence.

    That is its state in fp32, and the positions that its convolution sees.
    """
    whole = model.attention_layers - model.windows
    total = whole * cache_bytes(model, layout, sequences, context, element)
    total += model.windows * cache_bytes(model.local_model, layout, sequences, context, element)
    if model.special.linear:
        linear = model.special.linear
        states = 4.0 * linear.state + element * linear.channels * linear.kernel
        total += model.special.linear_layers * sequences * states / layout.tp
    return total / model.num_layers


def inference_memory(model: ModelSpec, layout: Layout, job: Job, software: Software) -> Memory:
    """Weights, the cache of all sequences of a replica, and the work space of a micro-batch."""
    weights = (rank_weights(model, layout) + expert_weights(model, layout)) * software.weight_bytes
    layers = max(layout.stages(model.num_layers))
    sequences = job.global_batch // layout.dp
    cache = layers * average_cache_bytes(model, layout, sequences, job.sequence, software.element)
    cache /= layout.cp
    tokens = layout.micro_batch * (job.sequence / layout.cp if job.task == "prefill" else 1)
    inner = model.fc1_factor * model.ffn / layout.tp + model.qkv_rows / layout.tp
    work = tokens * (4 * model.hidden_size + 2 * inner) * software.element
    if job.task == "prefill" and writes_scores(model, software):
        work += 6 * tokens * model.num_attention_heads / layout.tp * job.sequence
    return Memory(weights=weights, activations=work, cache=cache)


def writes_scores(model: ModelSpec, software: Software) -> bool:
    """Whether attention over prompts has no kernel that keeps scores on the chip."""
    grouped = model.num_query_groups < model.num_attention_heads
    kernel = kernel_that_runs(
        CHIPS["h100"], model.head_dim, grouped=grouped, training=False, asked=software.kernel
    )
    return kernel in WRITING


class StageSeconds(NamedTuple):
    """Of one micro-batch: the layers of each pipeline stage, the embedding on the first, the output on the
    last, and the message to the next stage, for which each waits."""

    layers: tuple[float, ...]
    embedding: float
    output: float
    message: float

    @property
    def stages(self) -> list[float]:
        """All that each stage does."""
        seconds = [layers + self.message for layers in self.layers]
        seconds[0] += self.embedding
        seconds[-1] += self.output
        return seconds


def _per_stage(scenario: Scenario, layout: Layout, seconds: float) -> tuple[float, ...]:
    """Seconds of all layers, dealt to the stages."""
    layers = scenario.model.num_layers
    return tuple(seconds * own / layers for own in layout.stages(layers))


def prefill_seconds(scenario: Scenario, layout: Layout) -> StageSeconds:
    """A micro-batch of prompts on one stage."""
    scenario = for_inference(scenario)
    model, job, cluster, software = scenario
    cost = layers_cost(scenario, strip(layout))
    rows = layout.micro_batch * job.sequence / layout.cp
    return StageSeconds(
        _per_stage(scenario, layout, cost.forward),
        stream_seconds(cluster.chip, 2 * rows * model.hidden_size * software.element),
        sum(step.seconds for step in _output_steps(scenario, layout)),
        _hop(scenario, layout, rows),
    )


def decode_stage_seconds(scenario: Scenario, layout: Layout) -> StageSeconds:
    """One token of every sequence of a micro-batch on one stage."""
    layers = sum(
        count * sum(step.exposed for step in steps)
        for steps, count in _decode_layers(scenario, layout)
    )
    return StageSeconds(
        _per_stage(scenario, layout, layers),
        0.0,
        sum(step.seconds for step in _output_steps(scenario, layout)),
        _hop(scenario, layout, layout.micro_batch),
    )


def _decode_layers(scenario: Scenario, layout: Layout) -> Iterator[tuple[tuple[Step, ...], int]]:
    model, job = scenario.model, scenario.job
    for kind in layer_kinds(model):
        windowed = kind.mixer == "window"
        context = min(job.sequence, model.window_size or job.sequence) if windowed else job.sequence
        yield decode_steps(scenario, strip(layout), context, kind), kind.layers


def predict_prefill(scenario: Scenario, layout: Layout) -> Prediction:
    """A batch of prompts through the pipeline, micro-batch after micro-batch, until the last has its token."""
    scenario = for_inference(scenario)
    model, job, _, software = scenario
    batches = layout.micro_batches(job.global_batch)
    each = prefill_seconds(scenario, layout)
    per_stage = each.stages
    seconds = pipeline_seconds(per_stage, batches)
    busy = max(per_stage) * batches
    layers = each.layers[per_stage.index(max(per_stage))]
    terms = {
        "layers": batches * layers,
        "embedding and output": busy - batches * (layers + each.message),
        "pipeline messages, exposed": batches * each.message,
        "pipeline bubble": seconds - busy,
    }
    rows = layout.micro_batch * job.sequence / layout.cp
    traffic = (
        *layer_traffic(scenario, layout, batches, (FORWARD,)),
        *traffic_of((step, batches) for step in _output_steps(scenario, layout)),
        *_messages(scenario, layout, rows, batches, each.message),
    )
    tokens = job.global_batch * job.sequence
    return Prediction(
        layout=layout,
        seconds=seconds,
        tokens=tokens,
        memory=inference_memory(model, layout, job, software),
        terms=terms,
        traffic=added(traffic),
        bubble=(seconds - busy) / seconds,
        model_flops=model.flops_per_token(job.sequence) / 3 * tokens,
        micro_batches=batches,
    )


def predict_decode(scenario: Scenario, layout: Layout) -> Prediction:
    """One token for every sequence; `job.sequence` positions are in the cache already."""
    model, job, _, software = scenario
    batches = layout.micro_batches(job.global_batch)
    each = decode_stage_seconds(scenario, layout)
    counted = [(step, float(batches)) for step in _output_steps(scenario, layout)]
    for steps, count in _decode_layers(scenario, layout):
        share = layout.stages(model.num_layers)[-1] / model.num_layers
        counted += [(step, count * share * batches) for step in steps]
    # A token goes through all stages before the next of its sequence can start; more micro-batches than
    # stages wait for each other.
    through, most = sum(each.stages), max(each.stages)
    seconds = max(through, batches * most)
    terms = {
        "layers": sum(each.layers),
        "output": each.output,
        "pipeline messages": layout.pp * each.message,
        "waiting for other micro-batches": seconds - through,
    }
    flops = 2 * model.active_parameters * job.global_batch
    flops += 4 * model.num_layers * model.width * job.sequence * job.global_batch
    messages = _messages(scenario, layout, layout.micro_batch, batches, each.message)
    return Prediction(
        layout=layout,
        seconds=seconds,
        tokens=job.global_batch,
        memory=inference_memory(model, layout, job, software),
        terms=terms,
        traffic=added([*traffic_of(counted), *messages]),
        bubble=max(0.0, 1 - batches * (most - each.message) / seconds) * (layout.pp > 1),
        model_flops=flops,
        micro_batches=batches,
    )


@functools.lru_cache(maxsize=4096)
def _output_steps(scenario: Scenario, layout: Layout) -> tuple[Step, ...]:
    """The logits of one token of every sequence of a micro-batch, on the last stage."""
    model, _, cluster, software = scenario
    record = Recorder(cluster, software.unquantised, software.element)
    rows = layout.micro_batch
    vocab = model.padded_vocab(layout.tp) / layout.tp
    record.gemm("output_layer", rows, vocab, model.hidden_size, phases=(FORWARD,))
    size = rows * vocab * layout.tp * record.element
    record.collective("logits", FORWARD, "all-gather", size, layout.tp_group, "tp")
    return tuple(record.steps)


def _message_bytes(scenario: Scenario, layout: Layout, tokens: float) -> float:
    cut = layout.tp if layout.sequence_parallel else 1
    return tokens * scenario.model.hidden_size * scenario.software.element / cut


def _hop(scenario: Scenario, layout: Layout, tokens: float) -> float:
    size = _message_bytes(scenario, layout, tokens)
    return point_to_point_seconds(scenario.cluster, size, layout.pp_group)


def _messages(
    scenario: Scenario, layout: Layout, tokens: float, batches: int, hop: float
) -> tuple[Traffic, ...]:
    """What a rank of the first stage sends to the next, of every micro-batch."""
    if layout.pp == 1:
        return ()
    size = batches * _message_bytes(scenario, layout, tokens)
    link = layout.pp_group.link(scenario.cluster)
    return (Traffic("pp", "send", link, size, batches * hop, batches * hop),)


@functools.lru_cache(maxsize=8192)
def decode_steps(
    scenario: Scenario, layout: Layout, context: int, kind: LayerKind
) -> tuple[Step, ...]:
    """One layer, one new token for each of `layout.micro_batch` sequences."""
    model, _, cluster, software = scenario
    model = model.local_model if kind.mixer == "window" else model
    special = model.special
    record = Recorder(cluster, software.precision, software.element)
    rows, hidden, element = layout.micro_batch, model.hidden_size, record.element
    width = model.width
    size = rows * hidden * element

    def summed(name: str) -> None:
        record.collective(name, FORWARD, "all-reduce", size, layout.tp_group, "tp")

    def gemm(
        name: str, columns: float, inner: float, count: float = rows, batch: float = 1
    ) -> None:
        record.gemm(name, count, columns, inner, batch=batch, phases=(FORWARD,))

    record.stream("input norm", rows * hidden, 2, 0)
    if kind.mixer == "linear":
        assert special.linear is not None, "a model without linear attention"
        width = special.linear.columns
        gemm("linear_in", special.linear.rows / layout.tp, hidden)
        _decode_linear(record, special.linear, layout)
    elif kind.mixer != "none" and special.latent:
        width = model.num_attention_heads * special.latent.value
        _decode_latent(record, model, layout, context, gemm)
    elif kind.mixer != "none":
        gemm("linear_qkv", model.qkv_rows / layout.tp, hidden)
        if layout.segments == 1 and layout.tp > model.num_query_groups:
            whole, group = rows * model.qkv_rows * element, layout.tp_group
            record.collective("stock QKV gather", FORWARD, "all-gather", whole, group, "qkv")
        record.stream("rotary embedding and cache", 3 * rows * model.qkv_rows / layout.tp, 2, 0)
        _decode_attention(record, model, layout, context)
    if kind.mixer != "none":
        gemm("linear_proj", hidden, width / layout.tp)
        summed("linear_proj output")
    if kind.mlp == "none":
        return tuple(record.steps)
    record.stream("MLP norm and residual", rows * hidden, 5, 0)
    if kind.mlp == "experts":
        _decode_experts(record, model, layout, gemm)
    else:
        ffn = model.ffn / layout.tp
        gemm("linear_fc1", ffn * model.fc1_factor, hidden)
        record.stream("activation", rows * ffn, model.fc1_factor + 1, 0)
        gemm("linear_fc2", hidden, ffn)
    summed("MLP output")
    return tuple(record.steps)


def _decode_attention(record: Recorder, model: ModelSpec, layout: Layout, context: int) -> None:
    rows, group, scores = layout.micro_batch, layout.head_group, 0.0
    read = cache_bytes(model, layout, rows, context, record.element)
    if layout.segments > 1:
        heads = head_layout(model, layout.tp, layout.segments, layout.query_layout)
        shape, cache = DecodeShape(heads, rows, context, record.element), cache_layout(layout.cache)
        scores = cache.score_bytes(shape)
        for step in cache.collectives(shape):
            # The faster one: an all-gather sends more, and small messages travel sooner by it.
            ways = {step.kind: step.size} | ({"all-gather": step.gathered} if step.gathered else {})
            times = {k: collective_seconds(record.cluster, k, ways[k], group) for k in ways}
            kind = min(ways, key=times.__getitem__)
            record.collective(step.name, FORWARD, kind, ways[kind], group, "exchange")
    flops = 4.0 * rows * model.width * context / layout.tp
    text = f"{rows} sequences, cache {layout.cache}, {read / 1e6:.1f} MB"
    seconds = decode_seconds(record.chip, read, scores)
    record.steps.append(Step("core attention", FORWARD, "attention", text, flops, read, seconds))


def _decode_linear(record: Recorder, linear: Linear, layout: Layout) -> None:
    """Reads and writes the state of every sequence, in fp32."""
    rows = layout.micro_batch
    moved = 8.0 * rows * linear.state / layout.tp
    text = f"{rows} sequences, {linear.name}, {moved / 1e6:.1f} MB"
    flops = 4.0 * rows * linear.state / layout.tp
    seconds = decode_seconds(record.chip, moved)
    record.steps.append(Step("state", FORWARD, "attention", text, flops, moved, seconds))


def _decode_latent(
    record: Recorder, model: ModelSpec, layout: Layout, context: int, gemm: Any
) -> None:
    """Absorbed: one head of latents that every rank holds, for all its query heads."""
    latent, rows = model.special.latent, layout.micro_batch
    assert latent is not None, "a model without latent attention"
    heads, rank = model.num_attention_heads / layout.tp, latent.query_rank
    gemm("linear_down", rank + latent.cached, model.hidden_size)
    gemm("linear_q_up", heads * latent.key, rank or model.hidden_size)
    # Into the space of latents and back: a small product for each head.
    gemm("absorbed keys", latent.kv_rank, latent.nope, rows, heads)
    read = cache_bytes(model, layout, rows, context, record.element)
    flops = 2.0 * rows * heads * context * (latent.cached + latent.kv_rank)
    peak = record.chip.flops[record.precision] * record.chip.sustained[record.precision]
    seconds = max(decode_seconds(record.chip, read), flops / peak)
    text = f"{rows} sequences, latents, {read / 1e6:.1f} MB"
    record.steps.append(Step("core attention", FORWARD, "attention", text, flops, read, seconds))
    gemm("absorbed values", latent.value, latent.kv_rank, rows, heads)


def _decode_experts(record: Recorder, model: ModelSpec, layout: Layout, gemm: Any) -> None:
    """Only experts that some token chose are read."""
    rows, hidden, width = layout.micro_batch, model.hidden_size, model.expert_width
    gemm("router", model.experts, hidden)
    if width != hidden:
        gemm("latent down", width, hidden)
    copies = rows * model.moe_router_topk
    size = copies * width * record.element
    record.collective("dispatch", FORWARD, "all-to-all", size, layout.ep_group, "ep")
    here = model.experts / layout.ep
    touched = here * (1 - (1 - 1 / model.experts) ** (copies * layout.ep))
    each = max(1.0, copies / max(touched, 1.0))
    ffn = model.moe_ffn / layout.etp
    gemm("experts fc1", ffn * model.fc1_factor, width, each, max(1.0, touched))
    gemm("experts fc2", width, ffn, each, max(1.0, touched))
    record.collective("combine", FORWARD, "all-to-all", size, layout.ep_group, "ep")
    if width != hidden:
        gemm("latent up", hidden, width)
    if model.shared_ffn:
        ffn = model.shared_ffn / layout.tp
        gemm("shared fc1", ffn * model.fc1_factor, hidden)
        gemm("shared fc2", hidden, ffn)
