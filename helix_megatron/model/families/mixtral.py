"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from helix_megatron.model.families.configuration import NO_BIASES, RMS_NORM, SILU, SIZES, keys
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.modules import Modules
from helix_megatron.model.families.pieces import Heads, Only, Tied, Vocabulary
from helix_megatron.model.families.positions import Rope, Window
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

EXPERTS = (
    Row("mlp.router.weight", "block_sparse_moe.gate.weight[E,D]"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "block_sparse_moe.experts.{expert}.w1.weight[M,D] "
        "block_sparse_moe.experts.{expert}.w3.weight[M,D]",
        "stacked",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc2.weight", "block_sparse_moe.experts.{expert}.w2.weight[D,M]"
    ),
)

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        Vocabulary(),
        RMS_NORM,
        SILU,
        Heads(kv_heads=8),
        Rope(theta=1e6),
        Window(),
        keys(max_position_embeddings=131072, norm_epsilon=1e-5),
        Tied(False),
        NO_BIASES,
        Experts(
            number=("num_local_experts", "num_experts"),
            size="intermediate_size",
            default_number=8,
            default_topk=2,
            dense_layers=False,
        ),
        Only(router_jitter_noise=(0.0,)),
    ),
    rows=ATTENTION_LAYER + EXPERTS,
    outer=LLAMA_OUTER,
    modules=Modules("Mixtral"),
)
