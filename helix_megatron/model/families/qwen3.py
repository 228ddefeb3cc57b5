"""Qwen3: norms of queries and keys, and windows in some layers."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, QK_NORM, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, Only, Tied
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=32, head_dim=128),
        Rope(),
        LayerWindows(),
        keys(max_position_embeddings=32768, norm_epsilon=1e-6),
        Tied(False),
        NO_BIASES,
        Only(attention_bias=(False,)),
        QK_NORM,
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
    modules=Modules("Qwen3"),
)
