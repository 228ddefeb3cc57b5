"""EXAONE 4: norms behind attention and MLP only; beside layers with windows others have no rotary embedding."""

from __future__ import annotations

from typing import Any

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, QK_NORM, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Always, Config, Heads, Tied, needed
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import (
    BEHIND_LAYER,
    BEHIND_NORMS,
    GATED_MLP,
    LLAMA_OUTER,
)


def windowed(config: Config, layer: int) -> bool:
    """All layers but every fourth have the window, if there is one."""
    step = config.get("sliding_window_pattern", 4)
    there = config.get("sliding_window", 4096) is not None
    return there and (not isinstance(step, int) or (layer + 1) % step != 0)


class WindowsWithRope(LayerWindows):
    """Windows; where there are any, layers without have no rotary embedding."""

    def flags(self, config: Config) -> dict[str, Any]:
        windows = super().flags(config)
        pattern = windows["window_attn_skip_freq"]
        if config.get("sliding_window", self.default) is None:
            return windows
        if windows["window_size"] is None:  # a window that no layer has
            pattern = [0] * needed(config, "num_hidden_layers")
        return windows | {"no_rope_freq": pattern and [1 - there for there in pattern]}


FAMILY = Family(
    name="exaone4",
    architecture="Exaone4ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=32),
        Rope(),
        WindowsWithRope(
            windowed,
            switch=False,
            keys=("sliding_window", "sliding_window_pattern", "layer_types"),
        ),
        keys(max_position_embeddings=2048, norm_epsilon=1e-5),
        Tied(False),
        NO_BIASES,
        QK_NORM,
        Always(post_norms=True, no_pre_norms=True),
    ),
    rows=BEHIND_LAYER + BEHIND_NORMS + GATED_MLP,
    outer=LLAMA_OUTER,
)
