"""Which values of a model's fields do not go together."""

from __future__ import annotations

import math
from typing import Any

from helix_megatron.errors import (
    HelixError,
    counted,
    divisors,
    listed,
    setting_error,
    with_settings,
)
from helix_megatron.model.patterns import is_pattern
from helix_megatron.model.sizes import ModelSizes

ACTIVATIONS = ("swiglu", "geglu", "quick_geglu", "openai_gelu", "squared_relu")
# Settings of other attention, which latent attention of Megatron does not read or has no tensors for.
WITHOUT_LATENTS = (
    *("group_query_attention", "add_qkv_bias", "qk_l2_norm", "qk_norm_all_heads", "softmax_scale"),
    "qk_norm_behind_rotary",
    *(
        "softmax_type",
        "window_size",
        "linear_attention_freq",
        "attention_output_gate",
        "post_norms",
    ),
    *("no_rope_freq", "rotary_percent", "rotary_interleaved", "rotary_base_windowed"),
    "attn_logit_softcapping",
    *("use_rope_scaling", "rotary_seq_len_interpolation_factor"),
)
# Settings of models whose layers have attention and MLP both, or that Megatron's HybridModel does not take.
WITHOUT_PATTERN = (
    *("linear_attention_freq", "multi_latent_attention", "moe_layer_freq", "no_rope_freq"),
    *("window_attn_skip_freq", "post_norms", "qk_norm_all_heads", "qk_l2_norm"),
    *("rotary_base_windowed", "use_rope_scaling"),
    *("hidden_dropout", "attn_logit_softcapping"),
    *("final_logit_softcapping", "qk_norm_behind_rotary", "moe_router_groups_by_best"),
)
LETTERS = "*M-E"
MOST_EXPERTS = 200_000  # of all layers


def check_options(model: ModelSizes) -> None:
    """Refuse values of a model that do not go together.

    Raises:
        HelixError: names the settings, why, and what to do.
    """
    chosen = [f"<{name}>" for name in ACTIVATIONS if getattr(model, name)]
    if len(chosen) > 1:
        raise setting_error(f"{listed(chosen)} exclude each other. Give one of them.")
    if model.max_position_embeddings < model.seq_length:  # type: ignore[operator]
        raise setting_error(
            f"<seq_length> {model.seq_length} is longer than <max_position_embeddings> "
            f"{model.max_position_embeddings}. Leave the latter out, or raise it."
        )
    rotated = model.rotary_dim
    if rotated % 2 and not model.multi_latent_attention:
        raise setting_error(
            f"rotary embedding rotates pairs of dimensions, and {rotated} of the {model.head_dim} "
            "dimensions of a head (<kv_channels>, <rotary_percent>) are not an even number."
        )
    scaled = model.use_rope_scaling or model.rotary_seq_len_interpolation_factor
    if scaled and "rope" not in model.traits:
        raise setting_error(
            "<use_rope_scaling> and <rotary_seq_len_interpolation_factor> scale rotary embedding, and "
            f"<position_embedding_type> is {model.position_embedding_type}. Leave them out."
        )
    if "yarn" in model.traits and (model.rotary_percent < 1 or model.rotary_interleaved or scaled):
        raise setting_error(
            "<position_embedding_type> yarn rotates pairs (k, k + d/2) of whole heads. "
            "Leave out <rotary_percent>, <rotary_interleaved>, <use_rope_scaling> and "
            "<rotary_seq_len_interpolation_factor>."
        )
    if model.rotary_base_windowed and model.rotary_interleaved:
        raise setting_error(
            "<rotary_base_windowed> turns pairs (k, k + d/2), and <rotary_interleaved> others. Leave out "
            "one of them."
        )
    if model.no_pre_norms and not model.post_norms:
        raise setting_error(
            "<no_pre_norms> leaves no norms at all. Add <post_norms>, or leave it out."
        )
    if model.post_norms and (model.num_experts or model.normalization != "RMSNorm"):
        raise setting_error(
            "<post_norms> is for dense models with <normalization> RMSNorm. Leave it out, or leave out "
            "<num_experts>."
        )
    _check_query_key_norms(model)
    _check_pattern(model, "no_rope_freq")
    _check_soft_cap(model)
    _check_hybrid(model)
    _check_linear_attention(model)
    _check_latent_attention(model)
    if not model.is_gated and (model.activation_func_clamp_value or model.glu_linear_offset):
        raise setting_error(
            "<activation_func_clamp_value> and <glu_linear_offset> are of gated MLPs. Leave them out, or "
            "add <swiglu>, <geglu> or <quick_geglu>."
        )
    if model.window_attn_skip_freq is not None and model.window_size is None:
        raise setting_error(
            "<window_attn_skip_freq> says which layers have a sliding window, and there is none. Add "
            "<window_size>, or leave it out."
        )
    _check_pattern(model, "window_attn_skip_freq")
    if "experts" in model.traits:
        _check_pattern(model, "moe_layer_freq")
        _check_experts(model)


def _check_soft_cap(model: ModelSizes) -> None:
    if model.attn_logit_softcapping is not None and (
        model.softmax_type != "vanilla" or model.transformer_impl == "transformer_engine"
    ):
        raise setting_error(
            "<attn_logit_softcapping> is known to Helix's own attention, without sinks and without Transformer "
            f"Engine: <softmax_type> is {model.softmax_type}, <transformer_impl> {model.transformer_impl}. "
            "Leave out these, or the soft cap."
        )


def _check_hybrid(model: ModelSizes) -> None:
    pattern = model.hybrid_layer_pattern
    if pattern is None:
        return
    if unknown := set(pattern) - set(LETTERS):
        raise setting_error(
            f"<hybrid_layer_pattern> {pattern!r:.80} has {listed(sorted(unknown))}. Valid letters: "
            f"{listed(LETTERS)}."
        )
    if len(pattern) != model.num_layers:
        raise setting_error(
            f"<hybrid_layer_pattern> has {len(pattern)} letters, and <num_layers> is {model.num_layers}. Give "
            "one letter for each layer."
        )
    if ("E" in pattern) != ("experts" in model.traits):
        raise setting_error(
            f"<hybrid_layer_pattern> has {counted(pattern.count('E'), 'layer')} of experts (E), and "
            f"<num_experts> is {model.num_experts}. Give both, or neither."
        )
    if model.position_embedding_type == "yarn" or model.normalization != "RMSNorm":
        raise setting_error(
            "<hybrid_layer_pattern> is for models with <normalization> RMSNorm and without yarn "
            "(<position_embedding_type>). Change these, or leave it out."
        )
    for name in WITHOUT_PATTERN:
        if getattr(model, name) != getattr(ModelSizes, name):
            raise setting_error(
                f"<{name}> is {getattr(model, name)!r:.80}, and layers of a <hybrid_layer_pattern> do not have "
                "it. Leave out one of the two."
            )
    if "mamba" in model.traits and model.mamba_num_heads % model.mamba_num_groups:
        raise setting_error(
            f"<mamba_num_heads> {model.mamba_num_heads} is no multiple of <mamba_num_groups> "
            f"{model.mamba_num_groups}. Give a multiple of it."
        )


def check_mamba_groups(model: Any, ranks: int) -> None:
    """Refuse tensor parallel ranks that cannot share the groups of Mamba heads, or the only group, evenly.

    Args:
        model: a model, or a configuration of Megatron, whose heads may be None.
        ranks: tensor parallel.

    Raises:
        HelixError: with the valid numbers of ranks.
    """
    shared = model.mamba_num_groups
    what = f"{shared} groups of Mamba heads (<mamba_num_groups>)"
    if shared == 1:
        states = model.mamba_state_dim
        heads = model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim
        shared = math.gcd(heads, states)
        what = f"{heads} Mamba heads (<mamba_num_heads>) and {states} states (<mamba_state_dim>) of one group"
    if shared % ranks:
        raise HelixError(
            with_settings(f"{what} cannot be dealt to {ranks} tensor parallel ranks."),
            valid=divisors(shared),
            valid_name="tensor parallel sizes",
        )


def _check_query_key_norms(model: ModelSizes) -> None:
    if model.qk_norm_all_heads and (
        not model.has_qk_norm_weights or model.normalization != "RMSNorm"
    ):
        raise setting_error(
            "<qk_norm_all_heads> is of <qk_layernorm> with <normalization> RMSNorm. Add both, or leave it "
            "out."
        )
    if model.qk_norm_behind_rotary and (
        not model.has_qk_norm_weights
        or model.qk_norm_all_heads
        or "linear attention" in model.traits
    ):
        raise setting_error(
            "<qk_norm_behind_rotary> is of <qk_layernorm> in attention, without <qk_norm_all_heads> and "
            "<linear_attention_freq>. Add the first, and leave out the others."
        )


def _check_linear_attention(model: ModelSizes) -> None:
    if "linear attention" not in model.traits:
        return
    _check_pattern(model, "linear_attention_freq")
    if not any(model.linear_layers):
        raise setting_error(
            "<linear_attention_freq> gives no layer a gated delta net. Leave it out."
        )
    keys, values = model.linear_num_key_heads, model.linear_num_value_heads
    if values % keys:
        raise setting_error(
            f"<linear_num_value_heads> {values} is no multiple of <linear_num_key_heads> {keys}. Give a "
            "multiple of it."
        )
    usual = model.normalization == "RMSNorm" and model.swiglu and model.disable_bias_linear
    if not usual or model.post_norms or model.qk_norm_all_heads:
        raise setting_error(
            "<linear_attention_freq> is for models with <normalization> RMSNorm, <swiglu> and "
            "<disable_bias_linear>, without <post_norms> and <qk_norm_all_heads>. Change these, or "
            "leave it out."
        )


def _check_latent_attention(model: ModelSizes) -> None:
    if not model.multi_latent_attention:
        return
    if model.position_embedding_type not in ("rope", "yarn") or model.qk_pos_emb_head_dim % 2:
        raise setting_error(
            "<multi_latent_attention> rotates pairs of <qk_pos_emb_head_dim> dimensions, and that is "
            f"{model.qk_pos_emb_head_dim} with <position_embedding_type> {model.position_embedding_type}. "
            "Give an even number, and rope or yarn."
        )
    needed: dict[str, Any] = {name: getattr(ModelSizes, name) for name in WITHOUT_LATENTS}
    needed |= {"normalization": "RMSNorm", "qk_layernorm": True, "disable_bias_linear": True}
    needed |= {"kv_channels": model.v_head_dim}
    if "yarn" in model.traits:
        needed["yarn_correction_range_round_to_int"] = True
    for name, value in needed.items():
        if getattr(model, name) != value:
            raise setting_error(
                f"<{name}> is {getattr(model, name)!r}, and with <multi_latent_attention> Megatron computes "
                f"only {value!r}. Give that, or leave out <multi_latent_attention>."
            )


def _check_pattern(model: ModelSizes, name: str) -> None:
    pattern = getattr(model, name)
    if pattern is not None and not is_pattern(pattern):
        raise setting_error(
            f"<{name}> is {pattern!r}. It must be a whole number of at least 1 or a list of 0 and 1."
        )
    if isinstance(pattern, tuple) and len(pattern) != model.num_layers:
        raise setting_error(
            f"<{name}> lists {len(pattern)} layers, and <num_layers> is {model.num_layers}. List "
            "all of them."
        )


def _check_experts(model: ModelSizes) -> None:
    assert model.num_experts is not None
    if sum(model.moe_layers) * model.num_experts > MOST_EXPERTS:
        raise setting_error(
            f"<num_experts> {model.num_experts} in {sum(model.moe_layers)} layers are more than "
            f"{MOST_EXPERTS:,} experts. Give fewer."
        )
    if not any(model.moe_layers):
        raise setting_error(
            "<moe_layer_freq> gives experts to no layer. Leave out <num_experts> for a dense model."
        )
    if not 1 <= model.moe_router_topk <= model.num_experts:
        raise setting_error(
            f"<moe_router_topk> {model.moe_router_topk}: a token has 1 to {model.num_experts} experts."
        )
    softmax = model.moe_router_score_function == "softmax"
    if model.moe_router_topk == 1 and softmax and not model.moe_router_pre_softmax:
        raise setting_error(
            "<moe_router_topk> 1 needs <moe_router_pre_softmax>: the softmax over one expert is always "
            "1, and the router would not learn."
        )
    if model.moe_router_enable_expert_bias and softmax:
        raise setting_error(
            "<moe_router_enable_expert_bias> needs <moe_router_score_function> sigmoid: Megatron's router "
            "adds no bias to a softmax."
        )
    if model.moe_latent_size and (not model.hybrid_layer_pattern or not model.disable_bias_linear):
        raise setting_error(
            "<moe_latent_size> is of experts without biases in layers of a <hybrid_layer_pattern>. Add that "
            "and <disable_bias_linear>, or leave it out."
        )
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (chosen is None) or (groups and chosen and chosen > groups):
        raise setting_error(
            f"<moe_router_num_groups> is {groups} and <moe_router_group_topk> {chosen}. Give both, the "
            "second at most the first, or neither."
        )
    if groups and model.num_experts % groups:
        raise setting_error(
            f"{model.num_experts} experts cannot be dealt to <moe_router_num_groups> {groups} groups. Valid: "
            f"{listed(divisors(model.num_experts))}."
        )
    if model.moe_router_groups_by_best and (
        groups is None or model.moe_router_topk * groups > model.num_experts * (chosen or 0)
    ):
        raise setting_error(
            f"<moe_router_groups_by_best> chooses <moe_router_topk> {model.moe_router_topk} experts of "
            f"<moe_router_group_topk> {chosen} of <moe_router_num_groups> {groups} groups of the "
            f"{model.num_experts}. Give groups that have so many, or leave it out."
        )
    if model.moe_apply_probs_on_input and model.moe_router_topk > 1:
        raise setting_error(
            f"<moe_apply_probs_on_input> needs <moe_router_topk> 1, and it is {model.moe_router_topk}."
        )
    if model.moe_shared_expert_gate and "shared experts" not in model.traits:
        raise setting_error(
            "<moe_shared_expert_gate> gates shared experts, and there are none. Add "
            "<moe_shared_expert_intermediate_size>, or leave it out."
        )
