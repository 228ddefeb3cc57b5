"""Granite 3 with experts: its multipliers, and all experts of a layer in one tensor."""

from __future__ import annotations

from helix_megatron.model.families.configuration import RMS_NORM, SILU, SIZES, keys
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.granite import MULTIPLIERS
from helix_megatron.model.families.pieces import Always, Heads, Only, Tied, Vocabulary
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

EXPERT_ROWS = (
    Row("mlp.router.weight", "block_sparse_moe.router.layer.weight[E,D]", when="experts"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "block_sparse_moe.input_linear.weight[E,2M,D]",
        when="experts",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc2.weight",
        "block_sparse_moe.output_linear.weight[E,D,M]",
        when="experts",
    ),
)
EXPERTS = Experts(
    number=("num_local_experts",),
    size="intermediate_size",
    default_number=8,
    default_topk=2,
    dense_layers=False,
)

FAMILY = Family(
    name="granitemoe",
    architecture="GraniteMoeForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        Vocabulary(),
        RMS_NORM,
        SILU,
        Heads(),
        Rope(),
        MULTIPLIERS,
        keys(max_position_embeddings=2048, norm_epsilon=1e-6),
        Tied(False),
        Always(disable_bias_linear=True, add_qkv_bias=False),
        Only(attention_bias=(False,)),
        EXPERTS,
    ),
    rows=ATTENTION_LAYER + EXPERT_ROWS,
    outer=LLAMA_OUTER,
)
