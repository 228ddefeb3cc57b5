"""Qwen2: Llama with biases of queries, keys and values, and windows in some layers."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, QKV_BIASES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, Tied
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=32),
        Rope(),
        LayerWindows(),
        keys(max_position_embeddings=32768, norm_epsilon=1e-6),
        Tied(False),
        QKV_BIASES,
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
    modules=Modules("Qwen2"),
)
