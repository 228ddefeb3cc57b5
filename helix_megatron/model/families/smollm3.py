"""SmolLM3: Llama without rotary embedding in every fourth layer."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Config, Heads, LinearBiases, Tied
from helix_megatron.model.families.positions import (
    LayersWithoutRope,
    LayerWindows,
    Rope,
    layers_with_rope,
)
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER


def windowed(config: Config, layer: int) -> bool:
    """Windows, where they are used, are those of the layers without rotary embedding."""
    used = config.get("use_sliding_window", False) and config.get("sliding_window") is not None
    return bool(used and not layers_with_rope(config, 4)[layer])


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=4),
        Rope(theta=2e6),
        LayersWithoutRope(),
        LayerWindows(windowed, default=None),
        keys(max_position_embeddings=32768, norm_epsilon=1e-6),
        Tied(True),
        LinearBiases(),
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
)
