"""Every tensor of a canonical checkpoint, from model flags alone.

*Canonical* is what stock megatron-core's `GPTModel` stores in a distributed checkpoint: its keys, global shapes
and row order. The *canonical name* of a tensor has every index in it, as in
`decoder.layers.3.mlp.experts.2.linear_fc1.weight`, where the checkpoint's *key* stacks layers and experts as
leading axes of one global tensor.

Neither torch nor megatron-core is needed. `partition` tells which part of a tensor a rank holds.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from helix_megatron.errors import HelixError
from helix_megatron.layout import HeadLayout, RotaryStyle, rotary_of

GATED = ("swiglu", "geglu", "quick_geglu")  # flags of which any makes linear_fc1 hold [gate; up]


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


@dataclass(frozen=True)
class ModelSizes:
    """What the tensors of a model depend on, with everything filled in that flags may leave out.

    The letters h, g, d are those of `helix_megatron.layout`; `ffn_hidden_size` and its like count the rows of
    one half where the MLP is gated.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_rows: int
    num_experts: int | None
    moe_ffn_hidden_size: int
    shared_expert_size: int | None
    gated: bool
    biases: bool
    qkv_bias: bool
    norm_bias: bool
    output_gate: bool
    rotary: RotaryStyle
    rotary_dim: int

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> ModelSizes:
        """From model flags (destination names of the training script's flags).

        Raises:
            HelixError: a size that nothing else implies is missing.
        """

        def need(name: str) -> int:
            value = flags.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise HelixError(
                    f"the model flags say {name} = {value!r}, and the tensors of a model depend on it. It must "
                    "be a whole number of at least 1."
                )
            return value

        hidden, heads = need("hidden_size"), need("num_attention_heads")
        dim = flags.get("kv_channels") or hidden // heads
        ffn = flags.get("ffn_hidden_size") or 4 * hidden
        rope = flags.get("position_embedding_type", "rope") == "rope"
        percent = flags.get("rotary_percent", 1.0) if rope else 0.0
        rotary, rotary_dim = rotary_of(dim, percent, flags.get("rotary_interleaved", False))
        biases = not flags.get("disable_bias_linear", False)
        return cls(
            num_layers=need("num_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=need("num_query_groups") if flags.get("group_query_attention") else heads,
            head_dim=dim,
            ffn_hidden_size=ffn,
            vocab_rows=need("padded_vocab_size"),
            num_experts=flags.get("num_experts") or None,
            moe_ffn_hidden_size=flags.get("moe_ffn_hidden_size") or ffn,
            shared_expert_size=flags.get("moe_shared_expert_intermediate_size") or None,
            gated=any(flags.get(name) for name in GATED),
            biases=biases,
            qkv_bias=biases or bool(flags.get("add_qkv_bias")),
            norm_bias=flags.get("normalization", "LayerNorm") == "LayerNorm",
            output_gate=bool(flags.get("attention_output_gate")),
            rotary=rotary,
            rotary_dim=rotary_dim,
        )

    @property
    def qkv_rows(self) -> int:
        """Rows of linear_qkv: g·(r + 2)·d, or g·(2r + 2)·d with an output gate."""
        queries = self.num_heads * (2 if self.output_gate else 1)
        return (queries + 2 * self.num_kv_heads) * self.head_dim


def moe_layers(flags: Mapping[str, Any]) -> list[bool]:
    """For each layer, whether it is an MoE layer.

    Raises:
        HelixError: a list of another length than there are layers.
    """
    layers = flags["num_layers"]
    if not flags.get("num_experts"):
        return [False] * layers
    frequency = flags.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    if len(frequency) != layers:
        raise HelixError(
            f"--moe-layer-freq lists {len(frequency)} layers, and the model has {layers}. List one number, 0 "
            "or 1, for each layer."
        )
    return [bool(entry) for entry in frequency]


def layers_are_stacked(flags: Mapping[str, Any]) -> bool:
    """Whether megatron-core stores the layers of a model as one tensor per name: not where they may differ."""
    return not flags.get("num_experts") or flags.get("moe_layer_freq", 1) == 1


def catalog(flags: Mapping[str, Any]) -> list[CanonicalTensor]:
    """Every tensor of a stock GPTModel with these model flags, in the order of its layers.

    Raises:
        HelixError: a flag is missing or makes no model.
    """
    sizes = ModelSizes.of(flags)
    shape: tuple[int, ...]
    vocabulary = (sizes.vocab_rows, sizes.hidden_size)
    tensors = [_alone("embedding.word_embeddings.weight", vocabulary, Cut.VOCABULARY)]
    if flags.get("position_embedding_type") == "learned_absolute":
        positions = flags.get("max_position_embeddings") or flags["seq_length"]
        shape = (positions, sizes.hidden_size)
        tensors.append(_alone("embedding.position_embeddings.weight", shape, Cut.REPLICATED))
    for layer, moe in enumerate(moe_layers(flags)):
        for suffix, shape, cut in _layer(sizes, flags, moe):
            tensors.append(_of_layer(flags, layer, suffix, shape, cut))
        if moe:
            tensors += _experts(sizes, flags, layer)
    for suffix, shape in _norm(sizes, "weight", "bias", sizes.hidden_size):
        tensors.append(_alone(f"decoder.final_layernorm.{suffix}", shape, Cut.REPLICATED))
    if flags.get("untie_embeddings_and_output_weights"):
        tensors.append(_alone("output_layer.weight", vocabulary, Cut.VOCABULARY))
    return tensors


Entry = tuple[str, tuple[int, ...], Cut]


def _alone(name: str, shape: tuple[int, ...], cut: Cut) -> CanonicalTensor:
    return CanonicalTensor(name, name, shape, cut)


def _of_layer(
    flags: Mapping[str, Any], layer: int, suffix: str, shape: tuple[int, ...], cut: Cut
) -> CanonicalTensor:
    name = f"decoder.layers.{layer}.{suffix}"
    if not layers_are_stacked(flags):
        return CanonicalTensor(name, name, shape, cut, layer=layer)
    stacked = (flags["num_layers"],)
    return CanonicalTensor(
        name, f"decoder.layers.{suffix}", shape, cut, (layer,), stacked, layer=layer
    )


def _experts(sizes: ModelSizes, flags: Mapping[str, Any], layer: int) -> Iterator[CanonicalTensor]:
    """Experts are a leading axis of their own, below that of stacked layers."""
    assert sizes.num_experts is not None
    stacked = layers_are_stacked(flags)
    number = "" if stacked else f"{layer}."
    above = (layer,) if stacked else ()
    above_shape = (sizes.num_layers,) if stacked else ()
    for expert in range(sizes.num_experts):
        for suffix, shape, cut in _mlp(sizes, sizes.moe_ffn_hidden_size, sizes.biases):
            yield CanonicalTensor(
                name=f"decoder.layers.{layer}.mlp.experts.{expert}.{suffix}",
                key=f"decoder.layers.{number}mlp.experts.experts.{suffix}",
                shape=shape,
                cut=cut,
                leading=(*above, expert),
                leading_shape=(*above_shape, sizes.num_experts),
                layer=layer,
                expert=expert,
            )


def _layer(sizes: ModelSizes, flags: Mapping[str, Any], moe: bool) -> Iterator[Entry]:
    """Everything of a layer but its experts."""
    hidden = sizes.hidden_size
    attention = "self_attention."
    for suffix, shape in _norm(sizes, "layer_norm_weight", "layer_norm_bias", hidden):
        yield f"{attention}linear_qkv.{suffix}", shape, Cut.REPLICATED
    yield f"{attention}linear_qkv.weight", (sizes.qkv_rows, hidden), Cut.QKV_ROWS
    if sizes.qkv_bias:
        yield f"{attention}linear_qkv.bias", (sizes.qkv_rows,), Cut.QKV_ROWS
    if flags.get("qk_layernorm") and not flags.get("qk_l2_norm"):
        for name in ("q_layernorm", "k_layernorm"):
            for suffix, shape in _norm(sizes, "weight", "bias", sizes.head_dim):
                yield f"{attention}{name}.{suffix}", shape, Cut.REPLICATED
    columns = sizes.num_heads * sizes.head_dim
    yield f"{attention}linear_proj.weight", (hidden, columns), Cut.PROJ_COLUMNS
    if sizes.biases:
        yield f"{attention}linear_proj.bias", (hidden,), Cut.REPLICATED
    for suffix, shape in _norm(sizes, "layer_norm_weight", "layer_norm_bias", hidden):
        yield f"mlp.linear_fc1.{suffix}", shape, Cut.REPLICATED
    if not moe:
        for suffix, shape, cut in _mlp(sizes, sizes.ffn_hidden_size, sizes.biases):
            yield f"mlp.{suffix}", shape, cut
        return
    yield from _shared(sizes, flags)


def _shared(sizes: ModelSizes, flags: Mapping[str, Any]) -> Iterator[Entry]:
    """What the experts of a layer share: the router, and experts of all tokens."""
    hidden = sizes.hidden_size
    assert sizes.num_experts is not None
    yield "mlp.router.weight", (sizes.num_experts, hidden), Cut.REPLICATED
    if sizes.biases:
        yield "mlp.router.bias", (sizes.num_experts,), Cut.REPLICATED
    if sizes.shared_expert_size is not None:
        for suffix, shape, cut in _mlp(sizes, sizes.shared_expert_size, sizes.biases):
            yield f"mlp.shared_experts.{suffix}", shape, cut
        if flags.get("moe_shared_expert_gate"):
            yield "mlp.shared_experts.gate_weight", (1, hidden), Cut.REPLICATED


def _mlp(sizes: ModelSizes, ffn: int, biases: bool) -> Iterator[Entry]:
    rows = 2 * ffn if sizes.gated else ffn
    cut = Cut.GATED_ROWS if sizes.gated else Cut.ROWS
    yield "linear_fc1.weight", (rows, sizes.hidden_size), cut
    if biases:
        yield "linear_fc1.bias", (rows,), cut
    yield "linear_fc2.weight", (sizes.hidden_size, ffn), Cut.COLUMNS
    if biases:
        yield "linear_fc2.bias", (sizes.hidden_size,), Cut.REPLICATED


def _norm(
    sizes: ModelSizes, weight: str, bias: str, width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield weight, (width,)
    if sizes.norm_bias:
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


def segment_local_permutation(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    segments: int,
    rotary: RotaryStyle = "half",
    rotary_dim: int | None = None,
    output_gate: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """How `segment-local` attention reads the weights of an ordinary model.

    Segment j of key-value head i becomes key-value head i·m + j of a model with h·m query heads, g·m key-value
    heads and d/m dimensions.

    Returns:
        Canonical rows of the ordinary `linear_qkv` and columns of its `linear_proj`, int64, in the order in
        which the segment-local model has them.

    Raises:
        HelixError: m segments do not fit.
    """
    layout = HeadLayout(
        num_heads,
        num_kv_heads,
        head_dim,
        head_groups=num_kv_heads,
        segments=segments,
        query_layout="segments",
        rotary=rotary,
        rotary_dim=rotary_dim,
        output_gate=output_gate,
    )
    ranks = range(layout.num_ranks)
    rows = np.concatenate([layout.qkv_rows(rank) for rank in ranks])
    columns = np.concatenate([layout.proj_columns(rank) for rank in ranks])
    return rows, columns


def segment_local_flags(flags: Mapping[str, Any], segments: int) -> dict[str, Any]:
    """The model flags of an ordinary model after `segment_local_permutation`.

    Raises:
        HelixError: queries and keys are normalised over whole heads, with weights that a segment cannot share.
    """
    sizes = ModelSizes.of(flags)
    if flags.get("qk_layernorm") and not flags.get("qk_l2_norm"):
        raise HelixError(
            f"the model normalises each head's {sizes.head_dim} query and key dimensions with weights of that "
            "length (--qk-layernorm). Segments of a head would need weights of their own, which no stock model "
            "has, so it cannot become segment-local. Take attention exact."
        )
    return dict(flags) | {
        "group_query_attention": sizes.num_kv_heads != sizes.num_heads,
        "num_attention_heads": sizes.num_heads * segments,
        "num_query_groups": sizes.num_kv_heads * segments,
        "kv_channels": sizes.head_dim // segments,
    }
