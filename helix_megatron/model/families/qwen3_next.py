"""Qwen3-Next: gated delta nets in three of four layers, gated attention, and experts beside a shared one."""

from __future__ import annotations

from helix_megatron.model.families.configuration import DENSE_SIZE
from helix_megatron.model.families.delta_net import LAYER, QWEN, parts_of
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Heads
from helix_megatron.model.families.tensors import GATED_MLP, LLAMA_OUTER, QWEN_EXPERTS

PROJECTIONS = (
    *parts_of(
        "linear_attn.in_proj_qkvz.weight[QKVZs,D]",
        "query key value z",
        blocks="Kh",
        parts=("Kd", "Kd", "Vk", "Vk"),
        prefix="in_proj.weight.",
    ),
    *parts_of(
        "linear_attn.in_proj_ba.weight[2Vh,D]",
        "beta alpha",
        blocks="Kh",
        parts=("R", "R"),
        prefix="in_proj.weight.",
    ),
)

FAMILY = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *QWEN,
        DENSE_SIZE,
        Heads(kv_heads=2, head_dim=256),
        Experts(
            number=("num_experts",),
            size="moe_intermediate_size",
            default_number=512,
            default_topk=10,
            normalised=True,
            shared_size=512,
        ),
    ),
    rows=LAYER + PROJECTIONS + GATED_MLP + QWEN_EXPERTS,
    outer=LLAMA_OUTER,
    predicts_further=True,
    runs_in_engine=False,
)
