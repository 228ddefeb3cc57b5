"""Gemma 2: Gemma with norms before and behind, windows in every second layer, and soft caps."""

from __future__ import annotations

from helix_megatron.model.families.configuration import DENSE_SIZE, NO_BIASES, SIZES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.gemma3 import LAYER, ScoreScale
from helix_megatron.model.families.gpt_oss import windowed
from helix_megatron.model.families.pieces import (
    Activation,
    Always,
    EmbeddingScale,
    Heads,
    Only,
    SoftCaps,
    Tied,
    Vocabulary,
)
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import LLAMA_OUTER

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        DENSE_SIZE,
        Vocabulary(),
        Always(normalization="RMSNorm", apply_layernorm_1p=True, post_norms=True),
        Activation(
            "hidden_activation", "gelu_pytorch_tanh", {"gelu_pytorch_tanh": {"geglu": True}}
        ),
        Heads(kv_heads=4, head_dim=256),
        Rope(),
        LayerWindows(windowed, switch=False, keys=("sliding_window", "layer_types")),
        ScoreScale(),
        SoftCaps(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        EmbeddingScale(),
        keys(max_position_embeddings=8192, norm_epsilon=1e-6),
        Tied(True),
        NO_BIASES,
        Only(attention_bias=(False,), use_bidirectional_attention=(None, False)),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
