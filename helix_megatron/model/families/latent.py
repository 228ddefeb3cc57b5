"""Multi-latent attention in `config.json`, and its tensors, as DeepSeek's models have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import NO_BIASES, QK_NORM
from helix_megatron.model.families.family import Row
from helix_megatron.model.families.pieces import Always, Config, Only, Piece, Unread, Values, needed
from helix_megatron.model.families.positions import Rope


@dataclass(frozen=True)
class LatentHeads(Piece):
    """Query heads, which have keys and values of their own, and whether queries have a latent (null: none).

    Args:
        kv_heads: `num_key_value_heads` when the key is absent; None for as many as there are query heads.
    """

    kv_heads: int | None
    keys: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads", "q_lora_rank")
    fields: ClassVar = {
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "q_lora_rank": "q_lora_rank",
    }

    def flags(self, config: Config) -> dict[str, Any]:
        heads = needed(config, "num_attention_heads")
        kv_heads = config.get("num_key_value_heads", self.kv_heads) or heads
        if kv_heads != heads:
            raise HelixError(
                f"config.json sets num_key_value_heads = {kv_heads} and num_attention_heads = {heads}. With "
                "latents every head has keys and values of its own: give the same number."
            )
        return {
            "num_attention_heads": heads,
            "group_query_attention": False,
            "q_lora_rank": config.get("q_lora_rank", 1536),
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        heads = model.num_attention_heads
        both = {"num_attention_heads": heads, "num_key_value_heads": heads}
        return both | {"q_lora_rank": model.q_lora_rank}


class LatentRope(Rope):
    """Megatron's latent attention has plain rotary embedding, and yarn with whole numbers of pairs."""

    def flags(self, config: Config) -> dict[str, Any]:
        flags = super().flags(config)
        if flags["use_rope_scaling"] or flags["rotary_seq_len_interpolation_factor"]:
            raise HelixError(
                "config.json asks for scaled rotary embedding (rope_parameters or rope_scaling) in latent "
                "attention, where Megatron has rope_type default and yarn only."
            )
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if rope.get("mscale_all_dim") and not rope.get("mscale"):
            raise HelixError(
                f"config.json sets mscale_all_dim = {rope['mscale_all_dim']} of yarn rotary embedding without "
                "mscale, and Megatron's latent attention has both or neither. Give mscale, too."
            )
        if not flags.get("yarn_correction_range_round_to_int", True):
            raise HelixError(
                "config.json sets truncate = false of yarn rotary embedding, and Megatron's latent attention "
                "rounds the range of pairs. Valid: true."
            )
        return flags


class LatentNorms(Piece):
    """`rms_norm_eps` of all norms but those of latents, whose epsilon transformers never changes."""

    keys = ("rms_norm_eps",)
    fields: ClassVar = {"rms_norm_eps": "norm_epsilon"}

    def flags(self, config: Config) -> dict[str, Any]:
        epsilon = needed(config, "rms_norm_eps", OF_LATENTS)
        own = None if epsilon == OF_LATENTS else OF_LATENTS
        return {"norm_epsilon": epsilon, "latent_norm_epsilon": own}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"rms_norm_eps": model.norm_epsilon}


OF_LATENTS = 1e-6
LATENT = (
    NO_BIASES,
    QK_NORM,
    Always(multi_latent_attention=True),
    LatentNorms(),
    Values(
        kv_lora_rank=("kv_lora_rank", 512),
        qk_nope_head_dim=("qk_head_dim", 128),
        qk_rope_head_dim=("qk_pos_emb_head_dim", 64),
        v_head_dim=("v_head_dim", 128),
    ),
    Unread("head_dim", "qk_head_dim"),  # which follow from these, whatever a file says
    Unread("ep_size", "aux_loss_alpha", "seq_aux"),  # of the publisher's own training
    Only(attention_bias=(False,)),
)
LAYER = (
    Row("input_layernorm.weight", "input_layernorm.weight[D]"),
    Row(
        "self_attention.linear_q_proj.weight",
        "self_attn.q_proj.weight[Qk,D]",
        when="no-query-latent",
    ),
    Row(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight[Lq,D]",
        when="query-latent",
    ),
    Row(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_a_layernorm.weight[Lq]",
        when="query-latent",
    ),
    Row(
        "self_attention.linear_q_up_proj.weight",
        "self_attn.q_b_proj.weight[Qk,Lq]",
        when="query-latent",
    ),
    Row("self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight[Ld,D]"),
    Row(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_a_layernorm.weight[Lk]",
    ),
    Row("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight[KV,Lk]"),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight[D,Q]"),
    Row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight[D]"),
)
