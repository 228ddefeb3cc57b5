"""ERNIE 4.5, dense: Llama whose rotary pairs are neighbours."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import AllBiases, Heads, Tied
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=2, head_dim=128),
        Rope(theta=500000.0, interleaved=True),
        keys(max_position_embeddings=131072, norm_epsilon=1e-5),
        Tied(True),
        AllBiases(False),
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
)
