"""Bytes on the fullest GPU, as megatron-core allocates them."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

from helix_megatron.attention_rates import WRITING, kernel_that_runs
from helix_megatron.core.exchanges import COSTS
from helix_megatron.core.kernels import CAPPED_QUERIES
from helix_megatron.hardware import (
    CHIPS,
    FRAGMENTS,
    FRAMEWORK_BYTES,
    GRADIENT_BYTES,
    OPTIMIZER_BYTES,
    OUTSIDE_BYTES,
)
from helix_megatron.plan.layouts import Layout, attention_shape, strip
from helix_megatron.plan.mixers import ORDINARY
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.settings import Job, Software

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    framework: float = FRAMEWORK_BYTES

    @functools.cached_property
    def total(self) -> float:
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.cache + self.framework

    @property
    def framework_range(self) -> tuple[float, float]:
        """The least and the most that CUDA, NCCL and fragments may take."""
        allocated = self.total - self.framework
        least, most = (
            share * allocated + outside
            for share, outside in zip(FRAGMENTS, OUTSIDE_BYTES, strict=True)
        )
        return least, most


def layer_weights(model: ModelSpec, layout: Layout) -> float:
    """Parameters of one rank in an average layer, without experts."""
    shares = model.dense_layers * model.mlp_parameters(layout.tp)
    if model.expert_layers:
        shares += model.expert_layers * model.router_parameters(layout.tp)
    return model.attention_parameters(layout.tp) + shares / model.num_layers


def outer_weights(model: ModelSpec, layout: Layout, stage: int) -> float:
    """Parameters of a pipeline stage beside its layers: embeddings on the first, output on the last."""
    embedding = model.padded_vocab(layout.tp) / layout.tp * model.hidden_size
    held = 0.0
    if stage == 0:
        held += embedding + model.learned_positions * model.hidden_size
    if stage == layout.pp - 1:
        held += model.norm_parameters
        held += 0.0 if model.embeddings == layout.pp == 1 else embedding
    return held


def rank_weights(model: ModelSpec, layout: Layout, stage: int | None = None) -> float:
    """Parameters of a rank without experts; of the fullest stage, unless one is named."""
    cut = Layout(tp=layout.tp, pp=layout.pp, first=layout.first, last=layout.last)
    return _rank_weights(model, cut, stage)


@functools.lru_cache(maxsize=4096)
def _rank_weights(model: ModelSpec, layout: Layout, stage: int | None) -> float:
    dealt, layer = layout.stages(model.num_layers), layer_weights(model, layout)
    stages = layout.ends if stage is None else (stage,)
    return max(dealt[s] * layer + outer_weights(model, layout, s) for s in stages)


def expert_weights(model: ModelSpec, layout: Layout, stage: int | None = None) -> float:
    """Parameters of experts on one rank; of the stage with the most layers, unless one is named."""
    if not model.experts:
        return 0.0
    here = model.experts / layout.ep * model.expert_parameters / layout.etp
    dealt = layout.stages(model.num_layers)
    share = (max(dealt) if stage is None else dealt[stage]) / model.num_layers
    return model.expert_layers * share * here


def optimizer_bytes(software: Software) -> int:
    """Bytes of Adam's states of one parameter; weights in fp32 need no master copy."""
    return OPTIMIZER_BYTES - (4 if software.precision == "fp32" else 0)


def training_states(
    model: ModelSpec, layout: Layout, software: Software, stage: int | None = None
) -> Memory:
    """Weights, gradients and Adam's states in mixed precision, without activations."""
    degrees = layout.degrees
    if stage is None and (layout.first or layout.last):
        found = [_states(model, degrees, software, end) for end in layout.ends]
        return max(found, key=lambda states: states.total)
    return _states(model, degrees, software, stage)


@functools.lru_cache(maxsize=16384)
def _states(model: ModelSpec, layout: Layout, software: Software, stage: int | None) -> Memory:
    dense = rank_weights(model, layout, stage)
    experts = expert_weights(model, layout, stage)
    held = dense + experts
    states = held
    if software.distributed_optimizer:
        states = dense / layout.dp_group.ranks + experts / max(layout.expert_dp_group.ranks, 1)
    return Memory(
        weights=held * software.weight_bytes,
        gradients=held * GRADIENT_BYTES,
        optimizer=states * optimizer_bytes(software),
    )


def training_memory(
    model: ModelSpec, layout: Layout, job: Job, software: Software, stage: int | None = None
) -> Memory:
    """Everything, with micro-batches in flight as the schedule holds them, on the ranks of a pipeline stage.

    Without one: the most weights and the most activations of the first stage, which holds most micro-batches,
    and the last, which computes the loss.
    """
    states = training_states(model, layout, software, stage)
    stages = layout.ends if stage is None else (stage,)
    which = RECOMPUTE.index(layout.recompute)
    activations = max(_activations(model, layout, job, software, s)[which] for s in stages)
    return dataclasses.replace(states, activations=activations)


def training_bytes(
    model: ModelSpec, layout: Layout, job: Job, software: Software
) -> tuple[float, ...]:
    """Totals of `training_memory` with each of `RECOMPUTE`, for searches."""
    states = training_states(model, layout, software).total
    found = [_activations(model, layout, job, software, s) for s in layout.ends]
    return tuple(states + max(of_stage) for of_stage in zip(*found, strict=True))


def layers_in_flight(layout: Layout, model: ModelSpec, batches: int, stage: int = 0) -> float:
    """Layers whose activations a stage holds at once, over all micro-batches (`schedule.order_of`)."""
    per_stage = layout.stages(model.num_layers)[stage]
    if layout.pp == 1:
        return per_stage
    if layout.vp == 1:
        return per_stage * min(layout.pp - stage, batches)
    chunks = 2 * (layout.pp - stage - 1) + (layout.vp - 1) * layout.pp + 1
    return per_stage / layout.vp * min(chunks, batches * layout.vp)


def _activations(
    model: ModelSpec, layout: Layout, job: Job, software: Software, stage: int
) -> tuple[float, ...]:
    """Bytes alive beside weights and states when most are, with each of `RECOMPUTE`: what backward needs, and
    work space."""
    batches = max(1, layout.micro_batches(job.global_batch))
    stripped = strip(layout)
    layer = layer_activations(model, stripped, job, software)
    flight = layers_in_flight(layout, model, batches, stage)
    own = _tokens(layout, job) / (layout.tp if layout.sequence_parallel else 1)
    hidden = own * model.hidden_size * software.element
    held, output = 0.0, 0.0
    if stage == layout.pp - 1:  # input and output of the final norm
        held, output = 2 * hidden, output_work(model, stripped, job, software)
    if layout.pp > 1:
        # The gradient that was received or sent last, and the input before, are still held; Megatron frees what
        # it has sent forward (deallocate_pipeline_outputs), the CPU's loop does not.
        held += hidden * (1 if stage == 0 else 2)
        if software.local_modules and stage < layout.pp - 1:
            held += hidden * flight * layout.vp / layout.stages(model.num_layers)[stage]
    return (
        held + flight * layer.kept + max(output, layer.work),
        held + flight * (layer.kept - layer.core) + max(output, layer.core + layer.work),
        held + flight * hidden + max(output, layer.kept + layer.work),
    )


class LayerActivations(NamedTuple):
    """Bytes of one layer and micro-batch: kept for the backward pass; the part of them that belongs to core
    attention, which selective recomputation frees; and work space of the backward pass."""

    kept: float
    core: float
    work: float


def _tokens(layout: Layout, job: Job) -> float:
    return layout.micro_batch * job.sequence / layout.cp


@functools.lru_cache(maxsize=16384)
def layer_activations(
    model: ModelSpec, layout: Layout, job: Job, software: Software
) -> LayerActivations:
    """What autograd keeps of one layer, average over dense and MoE layers.

    fp8 keeps the inputs of its matrix products in one byte.
    """
    element, hidden = software.element, model.hidden_size
    product = 1 if software.precision == "fp8" else element  # of a saved input of a matrix product
    tokens = _tokens(layout, job)
    own = tokens / layout.tp if layout.sequence_parallel else tokens
    mask = 2 * own * hidden if software.dropout else 0.0
    norms = 2 * own * hidden * (element + product) + mask
    if software.local_modules and model.norm_tensors == 1:
        norms += 2 * own * hidden * 6  # two fp32 tensors in place of its input
    core, scores = _core_attention(model, layout, job, software, tokens)
    if model.norms_queries:
        wide = 10 if software.local_modules and model.norm_tensors == 1 else element
        heads = model.num_attention_heads + model.num_query_groups
        norms += tokens * heads * model.head_dim / layout.tp * wide
    width = tokens * model.width / layout.tp
    inner = tokens * model.ffn / layout.tp * (model.fc1_factor * element + product)
    if software.local_modules and model.is_gated:
        inner += 2 * tokens * model.ffn / layout.tp * element
    if model.expert_layers:
        experts = _experts(model, layout, software, own, product)
        experts += tokens * model.shared_ffn / layout.tp * (model.fc1_factor + 1) * element
        share = model.expert_layers / (model.expert_layers + model.dense_layers)
        inner = share * experts + (1 - share) * inner
    gathered = tokens * hidden * element if layout.tp > 1 else 0.0
    # Backward, the MLP comes first: it is gone when attention needs its work space.
    work = gathered * (2 if layout.sequence_parallel else 1) + inner / 2
    if software.local_modules:  # gradients of weights are computed, then added
        work += hidden * model.ffn / layout.tp * element
    work = max(work, scores - inner)
    # The kernel's output for one sequence is already in the order that linear_proj reads.
    in_order = COSTS[layout.exchange].output_in_order and layout.micro_batch == 1
    copied = 0.0 if in_order else width * product
    if model.special != ORDINARY:
        return _mixed(model, layout, software, tokens, own, (norms, core, copied, inner, work))
    return LayerActivations(norms + core + copied + inner, core, work)


def _mixed(
    model: ModelSpec,
    layout: Layout,
    software: Software,
    tokens: float,
    own: float,
    ordinary: tuple[float, float, float, float, float],
) -> LayerActivations:
    """The average layer of a model with linear or latent attention, or with layers that are only one of both.

    Windows are counted as whole attention of the other layers' heads.
    """
    norms, core, copied, inner, work = ordinary
    special, element, layers = model.special, software.element, model.num_layers
    attention = model.attention_layers / layers
    if special.latent:
        latent, heads = special.latent, model.num_attention_heads / layout.tp
        core = tokens * heads * (2 * latent.key + 2 * latent.value) * element
        copied = own * 2 * (latent.query_rank + latent.cached) * element
    linear = 0.0
    if special.linear:
        of_one = special.linear.rows + special.linear.channels + 2 * special.linear.columns
        linear = tokens * of_one / layout.tp * element * special.linear_layers / layers
    if special.separate:  # one norm and one of the two parts
        norms, mlps = norms / 2, (model.dense_layers + model.expert_layers) / layers
        inner *= mlps
    core = attention * core
    return LayerActivations(norms + core + attention * copied + linear + inner, core, work)


def _experts(
    model: ModelSpec, layout: Layout, software: Software, own: float, product: int
) -> float:
    """Bytes that routed experts keep: inner activations, also weighted before the second product; their
    gathered input; and the tokens on their way there and back."""
    copies = own * model.moe_router_topk
    rows = copies * layout.etp
    inner = rows * model.moe_ffn / layout.etp
    kept = inner * ((model.fc1_factor + 1) * software.element + product)
    kept += rows * model.expert_width * product
    return kept + 4 * copies * model.expert_width * software.element


def _core_attention(
    model: ModelSpec, layout: Layout, job: Job, software: Software, tokens: float
) -> tuple[float, float]:
    """(bytes that core attention keeps, work space for its scores where they are written)."""
    element, m = software.element, layout.segments
    shape = attention_shape(model, layout, job.sequence, element)
    cost = COSTS[layout.exchange]
    local, writes_scores = cost.local_heads(shape.layout), cost.score_bytes(shape) > 0
    queries = tokens * local.heads * local.query_dim
    keys, values = (tokens * local.kv_heads * dim for dim in (local.query_dim, local.value_dim))
    width = tokens * model.width / layout.tp  # output elements of one rank
    size = (queries + keys + values + width) * element
    if model.rotary != "none":  # tables of sine and cosine in the precision of queries and keys
        of_queries = model.rotary_dim / (m if layout.query_layout == "segments" else 1)
        of_keys = model.rotary_dim / (m if cost.in_core else 1)
        size += 2 * job.sequence / layout.cp * (of_queries + of_keys) * element
    pairs = layout.micro_batch * local.heads * job.sequence**2 / layout.cp
    if model.rotary != "none" and m == 1:
        size += (queries + keys) * element  # values are a view of all that linear_qkv has written
    if model.attn_logit_softcapping is not None:  # scores of some queries at a time, computed again
        rows = min(CAPPED_QUERIES, job.sequence)
        return size, layout.micro_batch * local.heads * rows * job.sequence * 16
    kernel = kernel_that_runs(
        CHIPS["h100"],  # which kernels write scores is the same on all
        local.query_dim,
        grouped=model.num_query_groups < model.num_attention_heads,
        training=True,
        asked=software.kernel,
        exchange=layout.exchange,
    )
    if kernel not in WRITING and not writes_scores:
        return size + 4 * tokens * local.heads, 0.0
    dropped = pairs if software.dropout else 0.0
    if kernel == "math" and not writes_scores:  # torch's own attention: everything in fp32
        return size + pairs * 4 + (queries + keys + values) * (4 - element) + dropped, pairs * 8
    # Probabilities in fp32 and in 16 bits, and the mask that hides the future, a byte for each pair.
    size += pairs * (4 + element) + job.sequence**2 / layout.cp + dropped
    if writes_scores:
        return size + (queries + keys) * (4 - element), pairs * 14
    return size, pairs * 8


@functools.lru_cache(maxsize=4096)
def output_work(model: ModelSpec, layout: Layout, job: Job, software: Software) -> float:
    """Bytes at the loss: logits and their fp32 copy, which becomes the exponentials; or, backward, gradients of
    logits, input and weight."""
    tokens = _tokens(layout, job)
    logits = tokens * model.padded_vocab(layout.tp) / layout.tp
    gathered = tokens * model.hidden_size * software.element
    buffer = gathered if layout.sequence_parallel else 0.0
    weight = model.padded_vocab(layout.tp) / layout.tp * model.hidden_size * software.element
    own = gathered / (layout.tp if layout.sequence_parallel else 1)
    forward = buffer + logits * (software.element + 4)
    backward = buffer + gathered + own + logits * software.element + weight
    unfused = software.local_modules and model.norm_tensors == 1
    norm = 20 * own / software.element if unfused else 0.0
    return max(forward, backward, norm)  # the backward of an unfused RMSNorm: five tensors in fp32
