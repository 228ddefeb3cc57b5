"""Gated delta nets in `config.json`, and tensors of Qwen3-Next and Qwen3.5, most of whose layers have them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import RMS_NORM, SILU, SIZES, keys
from helix_megatron.model.families.family import Row
from helix_megatron.model.families.pieces import (
    Always,
    Config,
    Only,
    Piece,
    Tied,
    Unread,
    Values,
    Vocabulary,
    needed,
)
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER
from helix_megatron.model.families.towers import PICTURES

FULL, LINEAR = "full_attention", "linear_attention"


class LinearLayers(Piece):
    """Which layers have a gated delta net: all but every n-th, unless `layer_types` lists them."""

    keys = ("layer_types", "full_attention_interval")
    fields: ClassVar = {"full_attention_interval": "num_layers"}

    def flags(self, config: Config) -> dict[str, Any]:
        layers, types = needed(config, "num_hidden_layers"), config.get("layer_types")
        if types is None:
            every = needed(config, "full_attention_interval", 4)
            types = [FULL if (layer + 1) % every == 0 else LINEAR for layer in range(layers)]
        known = isinstance(types, list) and all(kind in (FULL, LINEAR) for kind in types)
        if not known or len(types) != layers:
            raise HelixError(
                f"config.json sets layer_types = {types!r:.120} for {layers} layers. It must be a list with "
                f"one of {listed((FULL, LINEAR))} for each."
            )
        linear = [int(kind == LINEAR) for kind in types]
        return {"linear_attention_freq": linear if any(linear) else None}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"layer_types": [LINEAR if linear else FULL for linear in model.linear_layers]}


class TextRope(Rope):
    """Of a text, in which all parts of a multimodal position are the position itself."""

    def flags(self, config: Config) -> dict[str, Any]:
        rope = config.get("rope_parameters")
        if isinstance(rope, dict):
            kept = {name: value for name, value in rope.items() if name not in PICTURES}
            config = {**config, "rope_parameters": kept}
        return super().flags(config)


QWEN = (
    SIZES,
    Vocabulary(),
    RMS_NORM,
    SILU,
    Always(
        apply_layernorm_1p=True,
        disable_bias_linear=True,
        add_qkv_bias=False,
        qk_layernorm=True,
        attention_output_gate=True,
    ),
    TextRope(partial=0.25),
    keys(max_position_embeddings=32768, norm_epsilon=1e-6),
    Tied(False),
    LinearLayers(),
    Values(
        linear_conv_kernel_dim=("linear_conv_kernel_dim", 4),
        linear_key_head_dim=("linear_key_head_dim", 128),
        linear_value_head_dim=("linear_value_head_dim", 128),
        linear_num_key_heads=("linear_num_key_heads", 16),
        linear_num_value_heads=("linear_num_value_heads", 32),
    ),
    Only(attention_bias=(False,), attn_output_gate=(True,)),
    Unread("mamba_ssm_dtype", "mtp_num_hidden_layers"),
)


def parts_of(
    source: str,
    names: str,
    *,
    blocks: str,
    parts: tuple[str, ...],
    prefix: str,
    when: str = "linear",
    own: str = "self_attention.",
) -> tuple[Row, ...]:
    """One row for each part of a source's rows; `names` are those of the parts."""
    return tuple(
        Row(f"{own}{prefix}{name}", source, when=when, part=(blocks, parts, place))
        for place, name in enumerate(names.split())
    )


def _only_attention(row: Row) -> Row:
    """The row of a layer of attention, whose queries have their gates beside them."""
    if not row.name.startswith("self_attention."):
        return row
    sources = row.sources.replace("q_proj.weight[Q,D]", "q_proj.weight[2Q,D]")
    return dataclasses.replace(row, sources=sources, when=f"{row.when} attention")


LAYER = (
    *map(_only_attention, ATTENTION_LAYER),
    Row(
        "self_attention.in_proj.layer_norm_weight",
        "input_layernorm.weight[D]",
        when="linear",
    ),
    *parts_of(
        "linear_attn.conv1d.weight[QKVs,1,C]",
        "query key value",
        blocks="1",
        parts=("Ks", "Ks", "Vs"),
        prefix="conv1d.weight.",
    ),
    Row("self_attention.dt_bias", "linear_attn.dt_bias[Vh]", when="linear"),
    Row("self_attention.A_log", "linear_attn.A_log[Vh]", when="linear"),
    Row("self_attention.out_norm.weight", "linear_attn.norm.weight[Vd]", when="linear"),
    Row("self_attention.out_proj.weight", "linear_attn.out_proj.weight[D,Vs]", when="linear"),
)
