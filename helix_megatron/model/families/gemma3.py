"""Gemma 3, text: Gemma with norms before and behind, norms of queries and keys, and two rotary bases."""

from __future__ import annotations

from typing import Any, ClassVar

from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import DENSE_SIZE, NO_BIASES, QK_NORM, SIZES, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import (
    Activation,
    Always,
    Config,
    EmbeddingScale,
    Heads,
    Only,
    Piece,
    SoftCaps,
    Tied,
    Unread,
    Vocabulary,
    needed,
)
from helix_megatron.model.families.positions import LayerWindows
from helix_megatron.model.families.tensors import ATTENTION_LAYER, GATED_MLP, LLAMA_OUTER
from helix_megatron.model.families.two_bases import TwoBases

LAYER = (
    *(row for row in ATTENTION_LAYER if not row.name.startswith("mlp.")),
    Row("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight[D]"),
    Row("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm.weight[D]"),
    *GATED_MLP,
    Row("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight[D]"),
)


def windowed(config: Config, layer: int) -> bool:
    """All layers but every sixth."""
    return (layer + 1) % needed(config, "sliding_window_pattern", 6) != 0


class ScoreScale(Piece):
    """`query_pre_attn_scalar`, of whose root scores are a fraction."""

    keys = ("query_pre_attn_scalar",)
    fields: ClassVar = {"query_pre_attn_scalar": "hidden_size"}  # a whole number

    def flags(self, config: Config) -> dict[str, Any]:
        return {"softmax_scale": needed(config, "query_pre_attn_scalar", 256) ** -0.5}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        scale = model.softmax_scale or model.head_dim**-0.5
        return {"query_pre_attn_scalar": round(scale**-2)}


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        DENSE_SIZE,
        Vocabulary(262208),  # files of models that see have neither this nor the heads
        Always(
            normalization="RMSNorm",
            apply_layernorm_1p=True,
            post_norms=True,
        ),
        Activation(
            "hidden_activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": {"geglu": True}}
        ),
        Heads(heads=8, kv_heads=4, head_dim=256),
        TwoBases(theta=1e6, local=1e4, local_key="rope_local_base_freq"),
        LayerWindows(
            windowed,
            switch=False,
            keys=("sliding_window", "sliding_window_pattern", "layer_types"),
        ),
        ScoreScale(),
        EmbeddingScale(),
        keys(max_position_embeddings=131072, norm_epsilon=1e-6),
        Tied(True),
        NO_BIASES,
        QK_NORM,
        Unread("cache_implementation", "attn_logit_softcapping"),
        Only(attention_bias=(False,), use_bidirectional_attention=(False, None)),
        SoftCaps(final_logit_softcapping=None),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
