"""Every tensor of a canonical checkpoint, from model flags alone.

*Canonical* is what stock megatron-core's `GPTModel` stores in a distributed checkpoint: its keys, global shapes
and row order. The *canonical name* of a tensor has every index in it, as in
`decoder.layers.3.mlp.experts.2.linear_fc1.weight`, where the checkpoint's *key* stacks layers and experts as
leading axes of one global tensor.

Neither torch nor megatron-core is needed. `partition` tells which part of a tensor a rank holds.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, setting_error
from helix_megatron.model.description import HEADS, ModelConfig
from helix_megatron.model.sizes import MAMBA_KERNEL

QUALITY = (
    "segment-local attention is another architecture: h·m heads of d/m dimensions. Ordinary weights lose "
    "quality in it, and how much is not known for your model. The nearest published method lost this: "
    "DeepSeek-V2-Lite, perplexity 6.31 → 7.24 without alignment (TPLA, arXiv 2508.15881)"
)


class Cut(enum.Enum):
    """How tensor parallelism cuts a tensor."""

    REPLICATED = "replicated"
    ROWS = "rows"
    COLUMNS = "columns"
    VOCABULARY = "vocabulary"  # rows, padded to a multiple of the ranks
    GATED_ROWS = "gated rows"  # a rank's rows of the gate, then its rows of the other half
    QKV_ROWS = "qkv rows"  # HeadLayout.qkv_rows
    PROJ_COLUMNS = "proj columns"  # HeadLayout.proj_columns


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor of a model.

    Args:
        name: canonical name.
        key: of the distributed checkpoint, without layer and expert where these are stacked.
        shape: of the tensor itself.
        cut: how tensor parallelism cuts it; inside an expert, expert tensor parallelism.
        leading: its place on the leading axes of the key's global tensor: (layer), (expert) or both.
        leading_shape: the sizes of those axes.
        layer: which layer it belongs to, if any.
        expert: which expert of the layer it belongs to, if any.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    cut: Cut
    leading: tuple[int, ...] = ()
    leading_shape: tuple[int, ...] = ()
    layer: int | None = None
    expert: int | None = None

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Of the key's global tensor."""
        return (*self.leading_shape, *self.shape)

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def layers_are_stacked(model: ModelConfig) -> bool:
    """Whether megatron-core stores the layers of a model as one tensor per name: not where they may differ."""
    alike = not model.num_experts or model.moe_layer_freq == 1
    return alike and model.linear_attention_freq is None and model.hybrid_layer_pattern is None


def catalog(flags: Mapping[str, Any]) -> list[CanonicalTensor]:
    """Every tensor of a stock GPTModel with these model flags, in the order of its layers."""
    model = ModelConfig.from_flags(flags)
    if model.padded_vocab_size is None:
        raise HelixError(
            "the model flags have no padded_vocab_size, the rows of the word embedding."
        )
    vocabulary = (model.padded_vocab_size, model.hidden_size)
    tensors = [_alone("embedding.word_embeddings.weight", vocabulary, Cut.VOCABULARY)]
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None
        positions = (model.max_position_embeddings, model.hidden_size)
        tensors.append(_alone("embedding.position_embeddings.weight", positions, Cut.REPLICATED))
    pattern = model.hybrid_layer_pattern
    for layer, (moe, linear) in enumerate(zip(model.moe_layers, model.linear_layers, strict=True)):
        own = layer_tensors(model, moe, linear)
        if pattern is not None:
            own = [*hybrid_tensors(model, pattern[layer], own)]
        tensors += [_of_layer(model, layer, *entry) for entry in own]
        for expert in range(model.num_experts or 0) if moe else ():
            inside = mlp_tensors(model, model.moe_ffn_hidden_size or 0, model.moe_latent_size)
            tensors += [_of_layer(model, layer, *entry, expert) for entry in inside]
    for suffix in ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",):
        name = f"decoder.final_{'norm' if pattern is not None else 'layernorm'}.{suffix}"
        tensors.append(_alone(name, (model.hidden_size,), Cut.REPLICATED))
    if model.untie_embeddings_and_output_weights:
        tensors.append(_alone("output_layer.weight", vocabulary, Cut.VOCABULARY))
    return tensors


Entry = tuple[str, tuple[int, ...], Cut]


def _alone(name: str, shape: tuple[int, ...], cut: Cut) -> CanonicalTensor:
    return CanonicalTensor(name, name, shape, cut)


def _of_layer(
    model: ModelConfig,
    layer: int,
    suffix: str,
    shape: tuple[int, ...],
    cut: Cut,
    expert: int | None = None,
) -> CanonicalTensor:
    """Stacked layers are a leading axis of the key's tensor, and experts one below it."""
    name = key = f"decoder.layers.{layer}."
    leading: list[tuple[int, int]] = []
    if layers_are_stacked(model):
        key = "decoder.layers."
        leading.append((layer, model.num_layers))
    if expert is not None:
        assert model.num_experts is not None
        name, key = f"{name}mlp.experts.{expert}.", f"{key}mlp.experts.experts."
        leading.append((expert, model.num_experts))
    places, sizes = (tuple(axis[part] for axis in leading) for part in (0, 1))
    return CanonicalTensor(name + suffix, key + suffix, shape, cut, places, sizes, layer, expert)


def layer_tensors(model: ModelConfig, moe: bool, linear: bool = False) -> list[Entry]:
    """Everything of a layer but its experts; with a gated delta net instead of attention where it is linear."""
    hidden, head = model.hidden_size, model.head_dim
    columns, experts = model.num_attention_heads * head, model.num_experts or 0
    whole, attention = Cut.REPLICATED, "self_attention."
    always, bias = True, not model.disable_bias_linear
    flat, keys = model.qk_norm_all_heads, model.num_query_groups * head
    before, behind = not model.no_pre_norms, model.post_norms
    layer_norm, head_norm = model.normalization == "LayerNorm", model.has_qk_norm_weights
    shared = model.moe_shared_expert_intermediate_size if moe else None
    latent = model.moe_latent_size or 0
    sinks, balanced = model.softmax_type == "learnable", model.moe_router_enable_expert_bias
    rows: list[tuple[bool, str, tuple[int, ...], Cut]] = [
        (before, f"{attention}linear_qkv.layer_norm_weight", (hidden,), whole),
        (layer_norm, f"{attention}linear_qkv.layer_norm_bias", (hidden,), whole),
        (always, f"{attention}linear_qkv.weight", (model.qkv_rows, hidden), Cut.QKV_ROWS),
        (model.has_qkv_bias, f"{attention}linear_qkv.bias", (model.qkv_rows,), Cut.QKV_ROWS),
        (head_norm, f"{attention}q_layernorm.weight", (columns if flat else head,), whole),
        (head_norm and layer_norm, f"{attention}q_layernorm.bias", (head,), whole),
        (head_norm, f"{attention}k_layernorm.weight", (keys if flat else head,), whole),
        (head_norm and layer_norm, f"{attention}k_layernorm.bias", (head,), whole),
        (
            sinks,
            f"{attention}core_attention.softmax_offset",
            (model.num_attention_heads,),
            Cut.ROWS,
        ),
        (always, f"{attention}linear_proj.weight", (hidden, columns), Cut.PROJ_COLUMNS),
        (bias, f"{attention}linear_proj.bias", (hidden,), whole),
        (behind, f"{attention}linear_proj.post_layernorm.weight", (hidden,), whole),
        (before, "mlp.linear_fc1.layer_norm_weight", (hidden,), whole),
        (behind, "mlp.linear_fc2.post_layernorm.weight", (hidden,), whole),
        (layer_norm, "mlp.linear_fc1.layer_norm_bias", (hidden,), whole),
        (moe, "mlp.router.weight", (experts, hidden), whole),
        (moe and bias, "mlp.router.bias", (experts,), whole),
        (moe and latent > 0, "mlp.fc1_latent_proj.weight", (latent, hidden), whole),
        (moe and latent > 0, "mlp.fc2_latent_proj.weight", (hidden, latent), whole),
        (moe and balanced, "mlp.router.expert_bias", (experts,), whole),
    ]
    entries: list[Entry] = [(suffix, shape, cut) for there, suffix, shape, cut in rows if there]
    if linear:
        others = [entry for entry in entries if not entry[0].startswith(attention)]
        entries = [*delta_net_tensors(model), *others]
    if model.multi_latent_attention:
        others = [entry for entry in entries if not entry[0].startswith(attention)]
        entries = [*latent_tensors(model), *others]
    if not moe or shared is not None:  # what all tokens pass through
        block = "mlp.shared_experts." if moe else "mlp."
        for suffix, shape, cut in mlp_tensors(model, shared or model.ffn_hidden_size or 0):
            entries.append((block + suffix, shape, cut))
    if shared is not None and model.moe_shared_expert_gate:
        entries.append(("mlp.shared_experts.gate_weight", (1, hidden), whole))
    return entries


def delta_net_tensors(model: ModelConfig) -> Iterator[Entry]:
    """Of a gated delta net, whose parts are cut by its own heads."""
    hidden, keys, values = model.hidden_size, model.linear_keys, model.linear_values
    heads, rows = model.linear_num_value_heads, {"query": keys, "key": keys, "value": values}
    own = "self_attention."
    yield f"{own}in_proj.layer_norm_weight", (hidden,), Cut.REPLICATED
    for part, size in (rows | {"z": values, "beta": heads, "alpha": heads}).items():
        yield f"{own}in_proj.weight.{part}", (size, hidden), Cut.ROWS
    for part, size in rows.items():
        yield f"{own}conv1d.weight.{part}", (size, 1, model.linear_conv_kernel_dim), Cut.ROWS
    for vector in ("dt_bias", "A_log"):
        yield f"{own}{vector}", (heads,), Cut.ROWS
    yield f"{own}out_norm.weight", (model.linear_value_head_dim,), Cut.REPLICATED
    yield f"{own}out_proj.weight", (hidden, values), Cut.COLUMNS


def hybrid_tensors(model: ModelConfig, letter: str, both: list[Entry]) -> Iterator[Entry]:
    """Of a layer that is attention, Mamba, MLP or experts alone; `both` has those of attention and MLP."""
    if letter == "M":
        yield from mamba_tensors(model)
    for name, shape, cut in both:
        if letter == "E" and name == "mlp.linear_fc1.layer_norm_weight":
            yield "pre_mlp_layernorm.weight", shape, cut
        elif letter != "M" and name.startswith("self_attention." if letter == "*" else "mlp."):
            yield name, shape, cut


def mamba_tensors(model: ModelConfig) -> Iterator[Entry]:
    """Of a Mamba layer, whose parts are cut by its own heads and groups."""
    hidden, inner, maps = model.hidden_size, model.mamba_inner, model.mamba_maps
    heads, convolved = model.mamba_num_heads, {"x": inner, "B": maps, "C": maps}
    yield "mixer.in_proj.layer_norm_weight", (hidden,), Cut.REPLICATED
    for part, size in ({"z": inner} | convolved | {"dt": heads}).items():
        yield f"mixer.in_proj.weight.{part}", (size, hidden), Cut.ROWS
    for part, size in convolved.items():
        yield f"mixer.conv1d.weight.{part}", (size, 1, MAMBA_KERNEL), Cut.ROWS
        yield f"mixer.conv1d.bias.{part}", (size,), Cut.ROWS
    for vector in ("dt_bias", "A_log", "D"):
        yield f"mixer.{vector}", (heads,), Cut.ROWS
    yield "mixer.norm.weight", (inner,), Cut.ROWS
    yield "mixer.out_proj.weight", (hidden, inner), Cut.COLUMNS


def latent_tensors(model: ModelConfig) -> Iterator[Entry]:
    """Of multi-latent attention: projections down to latents, and up from them to the heads."""
    hidden, heads, own = model.hidden_size, model.num_attention_heads, "self_attention."
    latent, rotated = model.kv_lora_rank, model.qk_pos_emb_head_dim
    queries, keys = heads * (model.qk_head_dim + rotated), heads * model.qk_head_dim
    values = heads * model.v_head_dim
    yield "input_layernorm.weight", (hidden,), Cut.REPLICATED
    if model.q_lora_rank is None:
        yield f"{own}linear_q_proj.weight", (queries, hidden), Cut.ROWS
    else:
        yield f"{own}linear_q_down_proj.weight", (model.q_lora_rank, hidden), Cut.ROWS
        yield f"{own}linear_q_up_proj.layer_norm_weight", (model.q_lora_rank,), Cut.REPLICATED
        yield f"{own}linear_q_up_proj.weight", (queries, model.q_lora_rank), Cut.ROWS
    yield f"{own}linear_kv_down_proj.weight", (latent + rotated, hidden), Cut.ROWS
    yield f"{own}linear_kv_up_proj.layer_norm_weight", (latent,), Cut.REPLICATED
    yield f"{own}linear_kv_up_proj.weight", (keys + values, latent), Cut.ROWS
    yield f"{own}linear_proj.weight", (hidden, values), Cut.COLUMNS


def mlp_tensors(model: ModelConfig, ffn: int, latent: int | None = None) -> Iterator[Entry]:
    width = latent or model.hidden_size
    rows = 2 * ffn if model.is_gated else ffn
    cut = Cut.GATED_ROWS if model.is_gated else Cut.ROWS
    yield "linear_fc1.weight", (rows, width), cut
    if not model.disable_bias_linear:
        yield "linear_fc1.bias", (rows,), cut
    yield "linear_fc2.weight", (width, ffn), Cut.COLUMNS
    if not model.disable_bias_linear:
        yield "linear_fc2.bias", (model.hidden_size,), Cut.REPLICATED


# ------------------------------------------------------------------------ byte entries


def extra_states(flags: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """(key, place, global shape) of the `_extra_state` objects that megatron-core's layers ask for on load.

    Its own linear layers store nothing in them; Transformer Engine's hold FP8 scales there.
    """
    places: dict[tuple[str, tuple[int, ...]], tuple[int, ...]] = {}
    for tensor in catalog(flags):
        module, _, last = tensor.key.rpartition(".")
        linear = module.rpartition(".")[2]
        if not linear.startswith("linear_") or last != "weight":
            continue
        modules = [module]
        if linear in ("linear_qkv", "linear_kv_up_proj"):
            modules.append(module.removesuffix(linear) + "core_attention")
        for owner in modules:
            if tensor.leading:
                places[f"{owner}._extra_state", tensor.leading] = tensor.leading_shape
            else:
                places[f"{owner}._extra_state", (0,)] = (1,)
    return [(key, place, shape) for (key, place), shape in places.items()]


# ------------------------------------------------------------------------ segment-local


def segment_local_permutation(model: ModelConfig, segments: int) -> tuple[np.ndarray, np.ndarray]:
    """How `segment-local` attention reads the weights of an ordinary model.

    Segment j of key-value head i becomes key-value head i·m + j of a model with h·m query heads, g·m key-value
    heads and d/m dimensions.

    Returns:
        Canonical rows of the ordinary `linear_qkv` and columns of its `linear_proj`, int64, in the order in
        which the segment-local model has them.
    """
    helix = HelixConfig(segments, query_layout="segments")
    layout = model.layout(helix, model.num_query_groups * segments)
    ranks = range(layout.num_ranks)
    rows = np.concatenate([layout.qkv_rows(rank) for rank in ranks])
    columns = np.concatenate([layout.proj_columns(rank) for rank in ranks])
    return rows, columns


def segment_local_flags(flags: Mapping[str, Any], segments: int) -> dict[str, Any]:
    """The model flags of an ordinary model after `segment_local_permutation`.

    Raises:
        HelixError: queries and keys are normalised over whole heads, with weights that a segment cannot share.
    """
    model = ModelConfig.from_flags(flags)
    if model.has_qk_norm_weights:
        raise setting_error(
            f"the model normalises each head's {model.head_dim} query and key dimensions with weights of "
            "that length (<qk_layernorm>). Segments of a head would need weights of their own, which no "
            "stock model has, so it cannot become segment-local. Take attention exact."
        )
    model = dataclasses.replace(
        model, group_query_attention=model.num_query_groups != model.num_attention_heads
    )
    cut = model.cut_heads(segments).to_flags()
    return {**flags, **{name: cut[name] for name in ("group_query_attention", *HEADS)}}
