"""Prefill and decode: seconds until the first token, seconds of a token, and the key-value cache.

The cache layouts over the m ranks of a head group (`helix_megatron.core.caches`) state what they send and read.
None of them stores a head twice; stock megatron-core with more ranks than key-value heads does.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from helix_megatron.core.caches import NAMES, cache_layout
from helix_megatron.plan.collective_time import (
    Group,
    collective_seconds,
    point_to_point_seconds,
)
from helix_megatron.plan.inference_memory import cache_bytes, cache_shape, inference_memory
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.mixers import Linear
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import LayerKind, layer_kinds, record_shared_groups
from helix_megatron.plan.roofline import decode_seconds, stream_seconds
from helix_megatron.plan.schedule import pipeline_seconds
from helix_megatron.plan.score import Prediction, layers_cost
from helix_megatron.plan.settings import Scenario, Software
from helix_megatron.plan.steps import FORWARD, Recorder, Step
from helix_megatron.plan.traffic import Traffic, added, layer_traffic, traffic_of


@functools.lru_cache(maxsize=64)
def inference_software(software: Software) -> Software:
    """The same without dropout."""
    return dataclasses.replace(software, dropout=False)


def for_inference(scenario: Scenario) -> Scenario:
    """The same with `inference_software`."""
    return scenario._replace(software=inference_software(scenario.software))


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
    found = [*_decode_layers(scenario, layout)]
    layers = sum(count * sum(step.exposed for step in steps) for steps, count in found)
    host = scenario.host_seconds * sum(count * len(steps) for steps, count in found)
    return StageSeconds(
        _per_stage(scenario, layout, max(layers, host)),
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
    if kind.mixer in ("linear", "beside"):
        assert special.linear is not None, "a model without linear attention"
        ranks = special.linear.ranks(layout.tp)
        gemm("linear_in", special.linear.rows / ranks, hidden)
        record_shared_groups(record, special.linear, layout.tp, rows, (FORWARD,))
        _decode_linear(record, special.linear, rows, ranks)
        gemm("linear_out", hidden, special.linear.columns / ranks)
        if ranks == layout.tp:
            summed("linear_out output")
    attention = kind.mixer not in ("linear", "none")
    if attention and special.latent:
        width = model.num_attention_heads * special.latent.value
        _decode_latent(record, model, layout, context, gemm)
    elif attention:
        gemm("linear_qkv", model.qkv_rows / layout.tp, hidden)
        if layout.segments == 1 and layout.tp > model.num_query_groups:
            whole, group = rows * model.qkv_rows * element, layout.tp_group
            record.collective("stock QKV gather", FORWARD, "all-gather", whole, group, "qkv")
        record.stream("rotary embedding and cache", 3 * rows * model.qkv_rows / layout.tp, 2, 0)
        _decode_attention(record, model, layout, context)
    if attention:
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
    rows = layout.micro_batch
    read = cache_bytes(model, layout, rows, context, record.element)
    scores = _cache_exchange(record, model, layout, context)
    flops = 4.0 * rows * model.width * context / layout.tp
    text = f"{rows} sequences, cache {layout.cache}, {read / 1e6:.1f} MB"
    seconds = decode_seconds(record.chip, read, scores)
    record.steps.append(Step("core attention", FORWARD, "attention", text, flops, read, seconds))


def _cache_exchange(record: Recorder, model: ModelSpec, layout: Layout, context: int) -> float:
    """What the cache layout sends in attention; returns the bytes of scores that it writes."""
    if layout.cache not in NAMES:
        return 0.0
    shape = cache_shape(model, layout, layout.micro_batch, context, record.element)
    cache, group = cache_layout(layout.cache), Group(shape.layout.segments)
    for step in cache.collectives(shape):
        # The faster one: an all-gather sends more, and small messages travel sooner by it.
        ways = {step.kind: step.size} | ({"all-gather": step.gathered} if step.gathered else {})
        times = {k: collective_seconds(record.cluster, k, ways[k], group) for k in ways}
        kind = min(ways, key=times.__getitem__)
        record.collective(step.name, FORWARD, kind, ways[kind], group, "exchange")
    return cache.score_bytes(shape)


def _decode_linear(record: Recorder, linear: Linear, rows: int, ranks: int) -> None:
    """Reads and writes the state of every sequence, in fp32."""
    moved = 8.0 * rows * linear.state / ranks
    text = f"{rows} sequences, {linear.name}, {moved / 1e6:.1f} MB"
    flops = 4.0 * rows * linear.state / ranks
    seconds = decode_seconds(record.chip, moved)
    record.steps.append(Step("state", FORWARD, "attention", text, flops, moved, seconds))


def _decode_latent(
    record: Recorder, model: ModelSpec, layout: Layout, context: int, gemm: Any
) -> None:
    """Absorbed: one head of latents, which all ranks together keep once, for the query heads of all."""
    latent, rows = model.special.latent, layout.micro_batch
    assert latent is not None, "a model without latent attention"
    heads, rank = model.num_attention_heads / layout.tp, latent.query_rank
    gemm("linear_down", rank + latent.cached, model.hidden_size)
    gemm("linear_q_up", heads * latent.key, rank or model.hidden_size)
    # Into the space of latents and back: a small product for each head.
    gemm("absorbed keys", latent.kv_rank, latent.nope, rows, heads)
    read = cache_bytes(model, layout, rows, context, record.element)
    _cache_exchange(record, model, layout, context)
    flops = 2.0 * rows * heads * context * (latent.cached + latent.kv_rank)
    peak = record.chip.flops[record.precision] * record.chip.sustained[record.precision]
    seconds = max(decode_seconds(record.chip, read), flops / peak)
    text = f"{rows} sequences, latents, cache {layout.cache}, {read / 1e6:.1f} MB"
    record.steps.append(Step("core attention", FORWARD, "attention", text, flops, read, seconds))
    gemm("absorbed values", latent.value, latent.kv_rank, rows, heads)


def fullest(mean: float, variance: float, ranks: int, most: float = math.inf) -> float:
    """The load of the fullest of so many ranks whose loads are drawn alike: the mean and √(2 ln ranks)
    deviations, the usual bound of the expected maximum. Tokens choose experts at random."""
    return min(most, mean + math.sqrt(2 * math.log(ranks) * variance))


def _decode_experts(record: Recorder, model: ModelSpec, layout: Layout, gemm: Any) -> None:
    """Only experts that some token chose are read, and all wait for the rank with the most of them."""
    rows, hidden, width = layout.micro_batch, model.hidden_size, model.expert_width
    gemm("router", model.experts, hidden)
    if width != hidden:
        gemm("latent down", width, hidden)
    copies = rows * model.moe_router_topk
    size = copies * width * record.element
    record.collective("dispatch", FORWARD, "all-to-all", size, layout.ep_group, "ep")
    here = model.experts / layout.ep
    chosen = 1 - (1 - 1 / model.experts) ** (copies * layout.ep)
    touched = fullest(here * chosen, here * chosen * (1 - chosen), layout.ep, here)
    each = max(1.0, fullest(copies, copies, layout.ep) / max(touched, 1.0))
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
