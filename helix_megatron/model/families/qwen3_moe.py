"""Qwen3-MoE: Qwen3 with experts."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, QK_NORM, keys
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, Only, Tied
from helix_megatron.model.families.positions import Rope, Window
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER, QWEN_EXPERTS

FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=4),
        Rope(),
        Window(default=4096, switch=True),
        keys(max_position_embeddings=32768, norm_epsilon=1e-6),
        Tied(False),
        NO_BIASES,
        Only(attention_bias=(False,)),
        QK_NORM,
        Experts(
            number=("num_local_experts", "num_experts"),
            size="moe_intermediate_size",
            default_number=128,
            default_topk=8,
        ),
    ),
    rows=LLAMA_LAYER + QWEN_EXPERTS,
    outer=LLAMA_OUTER,
    modules=Modules("Qwen3Moe"),
)
