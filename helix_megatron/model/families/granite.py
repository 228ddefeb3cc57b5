"""Granite 3: Llama with multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Heads, LinearBiases, Tied, Values
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

MULTIPLIERS = Values(
    embedding_multiplier=("embedding_multiplier", 1.0),
    attention_multiplier=("softmax_scale", 1.0),
    residual_multiplier=("residual_multiplier", 1.0),
    logits_scaling=("logits_scaling", 1.0),
)

FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        Rope(),
        MULTIPLIERS,
        keys(max_position_embeddings=2048, norm_epsilon=1e-6),
        Tied(False),
        LinearBiases(),
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
)
