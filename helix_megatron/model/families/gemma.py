"""Gemma 1: norms stored minus 1, scaled embeddings, gated GELU."""

from __future__ import annotations

from helix_megatron.model.families.configuration import DENSE_SIZE, NO_BIASES, SIZES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import (
    Activation,
    Always,
    EmbeddingScale,
    Heads,
    Only,
    Tied,
    Vocabulary,
)
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        DENSE_SIZE,
        Vocabulary(),
        Always(normalization="RMSNorm", apply_layernorm_1p=True),
        # Early files say gelu and mean its tanh form; hidden_activation is their correction.
        Activation(
            "hidden_act",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": {"geglu": True}, "gelu": {"geglu": True}},
        ),
        Only(hidden_activation=(None, "gelu_pytorch_tanh")),
        Heads(kv_heads=16, head_dim=256),
        Rope(),
        EmbeddingScale(),
        keys(max_position_embeddings=8192, norm_epsilon=1e-6),
        Tied(True),
        NO_BIASES,
        Only(attention_bias=(False,), use_bidirectional_attention=(None, False)),
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
    modules=Modules("Gemma"),
)
