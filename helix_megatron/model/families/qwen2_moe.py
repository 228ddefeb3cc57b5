"""Qwen2-MoE: experts, and one that all tokens share."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Always, Heads, Tied, Values
from helix_megatron.model.families.positions import (
    LayerWindows,
    Rope,
    every_second_below_max_window_layers,
)
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER, QWEN_EXPERTS

FAMILY = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=16),
        Rope(),
        LayerWindows(every_second_below_max_window_layers),
        keys(max_position_embeddings=32768, norm_epsilon=1e-6),
        Tied(False),
        Always(disable_bias_linear=True),
        Values(qkv_bias=("add_qkv_bias", True)),
        Experts(
            number=("num_experts",),
            size="moe_intermediate_size",
            default_number=60,
            default_topk=4,
            shared_size=5632,
        ),
    ),
    rows=LLAMA_LAYER + QWEN_EXPERTS,
    outer=LLAMA_OUTER,
    modules=Modules("Qwen2Moe"),
)
