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
from helix_megatron.errors import HelixError
from helix_megatron.model.description import HEADS, ModelConfig


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
        """Elements of the tensor itself."""
        return int(np.prod(self.shape, dtype=np.int64))


def layers_are_stacked(model: ModelConfig) -> bool:
    """Whether megatron-core stores the layers of a model as one tensor per name: not where they may differ."""
    return not model.num_experts or model.moe_layer_freq == 1


def catalog(flags: Mapping[str, Any]) -> list[CanonicalTensor]:
    """Every tensor of a stock GPTModel with these model flags, in the order of its layers.

    Raises:
        HelixError: a flag is missing or makes no model.
    """
    model = ModelConfig.from_flags(flags)
    if model.padded_vocab_size is None:
        raise HelixError(
            "the model flags have no padded_vocab_size, the rows of the word embedding."
        )
    shape: tuple[int, ...]
    vocabulary = (model.padded_vocab_size, model.hidden_size)
    tensors = [_alone("embedding.word_embeddings.weight", vocabulary, Cut.VOCABULARY)]
    if model.position_embedding_type == "learned_absolute":
        assert model.max_position_embeddings is not None
        shape = (model.max_position_embeddings, model.hidden_size)
        tensors.append(_alone("embedding.position_embeddings.weight", shape, Cut.REPLICATED))
    for layer, moe in enumerate(model.moe_layers):
        for suffix, shape, cut in layer_tensors(model, moe):
            tensors.append(_of_layer(model, layer, suffix, shape, cut))
        if moe:
            tensors += _experts(model, layer)
    for suffix, shape in _norm(model, "weight", "bias", model.hidden_size):
        tensors.append(_alone(f"decoder.final_layernorm.{suffix}", shape, Cut.REPLICATED))
    if model.untie_embeddings_and_output_weights:
        tensors.append(_alone("output_layer.weight", vocabulary, Cut.VOCABULARY))
    return tensors


Entry = tuple[str, tuple[int, ...], Cut]


def _alone(name: str, shape: tuple[int, ...], cut: Cut) -> CanonicalTensor:
    return CanonicalTensor(name, name, shape, cut)


def _of_layer(
    model: ModelConfig, layer: int, suffix: str, shape: tuple[int, ...], cut: Cut
) -> CanonicalTensor:
    name = f"decoder.layers.{layer}.{suffix}"
    if not layers_are_stacked(model):
        return CanonicalTensor(name, name, shape, cut, layer=layer)
    stacked = (model.num_layers,)
    return CanonicalTensor(
        name, f"decoder.layers.{suffix}", shape, cut, (layer,), stacked, layer=layer
    )


def _experts(model: ModelConfig, layer: int) -> Iterator[CanonicalTensor]:
    """Experts are a leading axis of their own, below that of stacked layers."""
    assert model.num_experts is not None and model.moe_ffn_hidden_size is not None
    stacked = layers_are_stacked(model)
    number = "" if stacked else f"{layer}."
    above = (layer,) if stacked else ()
    above_shape = (model.num_layers,) if stacked else ()
    for expert in range(model.num_experts):
        for suffix, shape, cut in mlp_tensors(model, model.moe_ffn_hidden_size):
            yield CanonicalTensor(
                name=f"decoder.layers.{layer}.mlp.experts.{expert}.{suffix}",
                key=f"decoder.layers.{number}mlp.experts.experts.{suffix}",
                shape=shape,
                cut=cut,
                leading=(*above, expert),
                leading_shape=(*above_shape, model.num_experts),
                layer=layer,
                expert=expert,
            )


def layer_tensors(model: ModelConfig, moe: bool) -> Iterator[Entry]:
    """Everything of a layer but its experts."""
    hidden = model.hidden_size
    attention = "self_attention."
    for suffix, shape in _norm(model, "layer_norm_weight", "layer_norm_bias", hidden):
        yield f"{attention}linear_qkv.{suffix}", shape, Cut.REPLICATED
    yield f"{attention}linear_qkv.weight", (model.qkv_rows, hidden), Cut.QKV_ROWS
    if model.has_qkv_bias:
        yield f"{attention}linear_qkv.bias", (model.qkv_rows,), Cut.QKV_ROWS
    if model.has_qk_norm_weights:
        for name in ("q_layernorm", "k_layernorm"):
            for suffix, shape in _norm(model, "weight", "bias", model.head_dim):
                yield f"{attention}{name}.{suffix}", shape, Cut.REPLICATED
    columns = model.num_attention_heads * model.head_dim
    yield f"{attention}linear_proj.weight", (hidden, columns), Cut.PROJ_COLUMNS
    if not model.disable_bias_linear:
        yield f"{attention}linear_proj.bias", (hidden,), Cut.REPLICATED
    for suffix, shape in _norm(model, "layer_norm_weight", "layer_norm_bias", hidden):
        yield f"mlp.linear_fc1.{suffix}", shape, Cut.REPLICATED
    if not moe:
        for suffix, shape, cut in mlp_tensors(model, model.ffn_hidden_size or 0):
            yield f"mlp.{suffix}", shape, cut
        return
    yield from _shared(model)


def _shared(model: ModelConfig) -> Iterator[Entry]:
    """What the experts of a layer share: the router, and experts of all tokens."""
    hidden = model.hidden_size
    assert model.num_experts is not None
    yield "mlp.router.weight", (model.num_experts, hidden), Cut.REPLICATED
    if not model.disable_bias_linear:
        yield "mlp.router.bias", (model.num_experts,), Cut.REPLICATED
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        for suffix, shape, cut in mlp_tensors(model, shared):
            yield f"mlp.shared_experts.{suffix}", shape, cut
        if model.moe_shared_expert_gate:
            yield "mlp.shared_experts.gate_weight", (1, hidden), Cut.REPLICATED


def mlp_tensors(model: ModelConfig, ffn: int) -> Iterator[Entry]:
    rows = 2 * ffn if model.is_gated else ffn
    cut = Cut.GATED_ROWS if model.is_gated else Cut.ROWS
    yield "linear_fc1.weight", (rows, model.hidden_size), cut
    if not model.disable_bias_linear:
        yield "linear_fc1.bias", (rows,), cut
    yield "linear_fc2.weight", (model.hidden_size, ffn), Cut.COLUMNS
    if not model.disable_bias_linear:
        yield "linear_fc2.bias", (model.hidden_size,), Cut.REPLICATED


def _norm(
    model: ModelConfig, weight: str, bias: str, width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield weight, (width,)
    if model.normalization == "LayerNorm":
        yield bias, (width,)


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
        if linear == "linear_qkv":
            modules.append(module.removesuffix("linear_qkv") + "core_attention")
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

    Raises:
        HelixError: m segments do not fit.
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
        raise HelixError(
            f"the model normalises each head's {model.head_dim} query and key dimensions with weights of that "
            "length (--qk-layernorm). Segments of a head would need weights of their own, which no stock model "
            "has, so it cannot become segment-local. Take attention exact."
        )
    model = dataclasses.replace(
        model, group_query_attention=model.num_query_groups != model.num_attention_heads
    )
    cut = model.cut_heads(segments).to_flags()
    return {**flags, **{name: cut[name] for name in ("group_query_attention", *HEADS)}}
