"""Qwen3.5 with experts beside a shared one in every layer, text."""

from __future__ import annotations

from helix_megatron.model.families.delta_net import QWEN
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Heads
from helix_megatron.model.families.qwen3_5 import QWEN3_5_LAYER
from helix_megatron.model.families.tensors import LLAMA_OUTER, QWEN_EXPERTS

FAMILY = Family(
    name="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *QWEN,
        Heads(kv_heads=2, head_dim=256),
        Experts(
            number=("num_experts",),
            size="moe_intermediate_size",
            default_number=256,
            default_topk=8,
            dense_layers=False,
            shared_size=512,
        ),
    ),
    rows=QWEN3_5_LAYER + QWEN_EXPERTS,
    outer=LLAMA_OUTER,
    predicts_further=True,
    runs_in_engine=False,
)
