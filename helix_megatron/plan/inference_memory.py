"""What inference keeps on the fullest rank: weights, and the cache of keys and values, latents and states."""

from __future__ import annotations

from helix_megatron.attention_rates import WRITING, kernel_that_runs
from helix_megatron.core.caches import NAMES, DecodeShape, cache_layout
from helix_megatron.core.layout import HeadLayout
from helix_megatron.hardware import CHIPS
from helix_megatron.plan.layouts import Layout, head_layout
from helix_megatron.plan.memory import Memory, expert_weights, rank_weights
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.settings import Job, Software


def cache_bytes(
    model: ModelSpec, layout: Layout, sequences: int, context: int, element: int
) -> float:
    """Bytes of keys and values, or of latents, of one layer with attention on one rank."""
    if layout.cache in NAMES:
        shape = cache_shape(model, layout, sequences, context, element)
        return cache_layout(layout.cache).read_bytes(shape)
    if model.special.latent:  # all ranks together keep it once
        return sequences * context * model.special.latent.cached * element / layout.tp
    if layout.segments > 1:
        shape = cache_shape(model, layout, sequences, context, element)
        return shape.cache_bytes() / layout.segments
    # Stock: a copy on every rank that has query heads of it.
    kv_heads = max(1.0, model.num_query_groups / layout.tp)
    return 2 * sequences * context * kv_heads * model.head_dim * element


def cache_shape(
    model: ModelSpec, layout: Layout, sequences: int, context: int, element: int
) -> DecodeShape:
    """What the ranks of a head group keep together; latents are one head of all tensor parallel ranks."""
    latent = model.special.latent
    if latent is None:
        heads = head_layout(model, layout.tp, layout.segments, layout.query_layout)
        return DecodeShape(heads, sequences, context, element)
    sizes = model.num_attention_heads, 1, latent.cached
    heads = HeadLayout(*sizes, segments=layout.tp, query_layout="heads", rotary="none")
    return DecodeShape(
        heads, sequences, context, element, latent.kv_rank, whole_keys=True, latent=True
    )


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
        states = model.special.linear.states(layout.tp, element)
        total += model.special.linear_layers * sequences * states
    return total / model.num_layers


def inference_memory(model: ModelSpec, layout: Layout, job: Job, software: Software) -> Memory:
    """Weights, the cache of all sequences of a replica, and the work space of a micro-batch."""
    weights = (rank_weights(model, layout) + expert_weights(model, layout)) * software.weight_bytes
    layers = max(layout.stages(model.num_layers))
    if model.special.wide_router:
        routers = model.expert_layers * model.experts * model.hidden_size
        weights += (4 - software.weight_bytes) * routers * layers / model.num_layers
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
