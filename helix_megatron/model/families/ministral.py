"""Ministral: Mistral with windows in some layers."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Config, Heads, Tied
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER


def windowed(config: Config, layer: int) -> bool:
    """All layers have the window, if there is one."""
    return config.get("sliding_window", 4096) is not None


FAMILY = Family(
    name="ministral",
    architecture="MinistralForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=8, explicit=True),
        Rope(),
        LayerWindows(windowed, switch=False),
        keys(max_position_embeddings=131072, norm_epsilon=1e-6),
        Tied(False),
        NO_BIASES,
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
)
