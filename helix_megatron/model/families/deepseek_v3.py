"""DeepSeek-V3: latent attention, and experts that a bias balances, beside a shared one, behind dense layers."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.experts import BalancedExperts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.latent import LATENT, LAYER, LatentHeads, LatentRope
from helix_megatron.model.families.pieces import Only, Tied, Unread
from helix_megatron.model.families.tensors import BALANCED_EXPERTS, GATED_MLP, LLAMA_OUTER

FAMILY = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        LatentHeads(kv_heads=128),
        *LATENT,
        LatentRope(),
        keys(max_position_embeddings=4096),
        Tied(False),
        BalancedExperts(number=256, topk=8, scaling=2.5, dense=3, groups=(8, 4)),
        Only(rope_interleave=(True,), scoring_func=("sigmoid",), topk_method=("noaux_tc",)),
        Only(moe_layer_freq=(1,)),
        # Layers of multi-token prediction, which transformers does not train or convert either.
        Unread("num_nextn_predict_layers", "num_mtp_layers"),
    ),
    rows=LAYER + GATED_MLP + BALANCED_EXPERTS,
    outer=LLAMA_OUTER,
    aliases=frozenset(("num_local_experts",)),
    predicts_further=True,
    runs_in_engine=False,
)
