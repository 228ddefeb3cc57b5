"""MiniMax-M2: norms of all query heads and all key heads together, and experts that a bias balances."""

from __future__ import annotations

from typing import Any

from helix_megatron.model.families.configuration import (
    NO_BIASES,
    QK_NORM,
    RMS_NORM,
    SILU,
    SIZES,
    keys,
)
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.mixtral import EXPERTS
from helix_megatron.model.families.pieces import (
    Always,
    Config,
    Heads,
    Only,
    Tied,
    Unread,
    Vocabulary,
    needed,
)
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

BIAS = Row("mlp.router.expert_bias", "block_sparse_moe.e_score_correction_bias[E]")


class RopeByDimensions(Rope):
    """Published files have `rotary_dim`, how many dimensions of a head turn."""

    def flags(self, config: Config) -> dict[str, Any]:
        turned = config.get("rotary_dim")
        if turned is not None:
            share = turned / needed(config, "head_dim", 128)
            config = {"partial_rotary_factor": share, **config}
        return super().flags(config)


FAMILY = Family(
    name="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        Vocabulary(),
        RMS_NORM,
        SILU,
        Heads(kv_heads=8, head_dim=128),
        RopeByDimensions(theta=5e6, partial=1.0),
        keys(max_position_embeddings=196608, norm_epsilon=1e-6),
        Tied(False),
        NO_BIASES,
        QK_NORM,
        Experts(
            number=("num_local_experts", "num_experts"),
            size="intermediate_size",
            default_number=256,
            default_topk=8,
            dense_layers=False,
        ),
        Only(router_jitter_noise=(0.0,), shared_intermediate_size=(0,)),
        # The files hold settings of an earlier model, and of layers of multi-token prediction.
        Unread(
            *("rotary_dim", "attn_type_list", "use_qk_norm", "qk_norm_type", "use_routing_bias"),
            *("scoring_func", "shared_moe_mode", "mlp_intermediate_size"),
            *(
                "layernorm_full_attention_beta",
                "layernorm_linear_attention_beta",
                "layernorm_mlp_beta",
            ),
            *("use_mtp", "num_mtp_modules", "mtp_transformer_layers"),
        ),
        Always(
            qk_norm_all_heads=True,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
        ),
    ),
    rows=(*ATTENTION_LAYER, *EXPERTS, BIAS),
    outer=LLAMA_OUTER,
)
