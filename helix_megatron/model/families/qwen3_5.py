"""Qwen3.5, text: Qwen3-Next with projections of its own for each part, and a dense MLP."""

from __future__ import annotations

from helix_megatron.model.families.configuration import DENSE_SIZE
from helix_megatron.model.families.delta_net import LAYER, QWEN, parts_of
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import Heads
from helix_megatron.model.families.tensors import GATED_MLP, LLAMA_OUTER

PROJECTIONS = (
    *parts_of(
        "linear_attn.in_proj_qkv.weight[QKVs,D]",
        "query key value",
        blocks="1",
        parts=("Ks", "Ks", "Vs"),
        prefix="in_proj.weight.",
    ),
    Row("self_attention.in_proj.weight.z", "linear_attn.in_proj_z.weight[Vs,D]", when="linear"),
    Row("self_attention.in_proj.weight.beta", "linear_attn.in_proj_b.weight[Vh,D]", when="linear"),
    Row("self_attention.in_proj.weight.alpha", "linear_attn.in_proj_a.weight[Vh,D]", when="linear"),
)
QWEN3_5_LAYER = LAYER + PROJECTIONS

FAMILY = Family(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(*QWEN, DENSE_SIZE, Heads(kv_heads=4, head_dim=256)),
    rows=QWEN3_5_LAYER + GATED_MLP,
    outer=LLAMA_OUTER,
    predicts_further=True,
    runs_in_engine=False,
)
