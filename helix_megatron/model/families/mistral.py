"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, Tied
from helix_megatron.model.families.positions import Rope, Window
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=8),
        Rope(),
        Window(default=4096),
        keys(max_position_embeddings=131072, norm_epsilon=1e-6),
        Tied(False),
        NO_BIASES,
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
    modules=Modules("Mistral"),
)
