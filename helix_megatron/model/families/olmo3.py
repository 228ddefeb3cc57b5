"""OLMo 3: OLMo 2 with windows in most layers, whose rotary embedding is not scaled."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, QK_NORM, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Always, Config, Heads, Only, Tied
from helix_megatron.model.families.positions import LayerWindows
from helix_megatron.model.families.tensors import (
    BEHIND_LAYER,
    BEHIND_NORMS,
    GATED_MLP,
    LLAMA_OUTER,
)
from helix_megatron.model.families.two_bases import TwoBases


def windowed(config: Config, layer: int) -> bool:
    """All layers but every fourth."""
    return (layer + 1) % 4 != 0


FAMILY = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        TwoBases(theta=500000.0, local=500000.0),
        LayerWindows(windowed, switch=False, keys=("sliding_window", "layer_types")),
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
