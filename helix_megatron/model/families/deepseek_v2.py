"""DeepSeek-V2 and V2-Lite: latent attention, and experts that a softmax chooses, beside shared ones."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.experts import SoftmaxExperts
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.latent import LATENT, LAYER, LatentHeads, LatentRope
from helix_megatron.model.families.pieces import Only, Tied
from helix_megatron.model.families.tensors import BALANCED_EXPERTS, GATED_MLP, LLAMA_OUTER

FAMILY = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        LatentHeads(kv_heads=None),
        *LATENT,
        LatentRope(),
        keys(max_position_embeddings=2048),
        Tied(False),
        SoftmaxExperts(number=64, topk=6, scaling=1.0, dense=0, shared=2),
        Only(mlp_bias=(False,)),
    ),
    rows=LAYER + GATED_MLP + BALANCED_EXPERTS,
    outer=LLAMA_OUTER,
    aliases=frozenset(("num_experts",)),
    runs_in_engine=False,
)
