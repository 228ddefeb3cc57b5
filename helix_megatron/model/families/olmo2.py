"""OLMo 2: norms behind attention and MLP only, and of all query heads and all key heads together."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, QK_NORM, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Always, Heads, Only, Tied
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import (
    BEHIND_LAYER,
    BEHIND_NORMS,
    GATED_MLP,
    LLAMA_OUTER,
)

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        Rope(),
        keys(max_position_embeddings=2048, norm_epsilon=1e-5),
        Tied(False),
        NO_BIASES,
        Only(attention_bias=(False,)),
        QK_NORM,
        Always(qk_norm_all_heads=True, post_norms=True, no_pre_norms=True),
    ),
    rows=BEHIND_LAYER + BEHIND_NORMS + GATED_MLP,
    outer=LLAMA_OUTER,
)
