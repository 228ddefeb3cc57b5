"""GLM-4.5: half of every head is rotated, and experts that a bias balances, beside a shared one."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.experts import BalancedExperts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Always, Heads, Tied, Unread, Values
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import BALANCED_EXPERTS, LLAMA_LAYER, LLAMA_OUTER

FAMILY = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=8),
        Rope(partial=0.5),
        keys(max_position_embeddings=131072, norm_epsilon=1e-5),
        Tied(False),
        Always(disable_bias_linear=True),
        Values(
            attention_bias=("add_qkv_bias", False),
            use_qk_norm=("qk_layernorm", False),
        ),
        BalancedExperts(number=128, topk=8, scaling=1.0, dense=1),
        # Layers of multi-token prediction, which transformers does not have either.
        Unread("num_nextn_predict_layers", "num_mtp_layers"),
    ),
    rows=LLAMA_LAYER + BALANCED_EXPERTS,
    outer=LLAMA_OUTER,
    aliases=frozenset(("num_local_experts",)),
    predicts_further=True,
)
