"""Llama 1 to 3, and models that are saved as such."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, LinearBiases, Tied
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        Rope(),
        keys(max_position_embeddings=2048, norm_epsilon=1e-6),
        Tied(False),
        LinearBiases(),
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
    modules=Modules("Llama"),
)
