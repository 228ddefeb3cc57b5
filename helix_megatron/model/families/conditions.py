"""What the conditions of a family's table of tensors ask for, and what the letters of its shapes stand for."""

from __future__ import annotations

from helix_megatron.model.description import ModelConfig
from helix_megatron.model.sizes import MAMBA_KERNEL


def features(
    model: ModelConfig, *, experts: bool = False, linear: bool = False, letter: str = ""
) -> set[str]:
    """What rows of tables ask for; `letter` is that of a layer of a hybrid pattern, empty without one."""
    found = {
        "mamba": letter == "M",
        "pattern": model.hybrid_layer_pattern is not None,
        "no-pattern": model.hybrid_layer_pattern is None,
        "sinks": model.softmax_type == "learnable",
        "expert-bias": experts and model.moe_router_enable_expert_bias,
        "norm-bias": model.normalization == "LayerNorm",
        "bias": not model.disable_bias_linear,
        "qkv-bias": model.has_qkv_bias,
        "qk-norm": model.qk_layernorm and not model.qk_norm_all_heads,
        "flat-norm": model.qk_layernorm and model.qk_norm_all_heads,
        "positions": model.position_embedding_type == "learned_absolute",
        "untied": model.untie_embeddings_and_output_weights,
        "attention": letter in ("", "*") and not linear,
        "linear": linear,
        "query-latent": model.q_lora_rank is not None,
        "no-query-latent": model.q_lora_rank is None,
        "experts": experts,
        "dense": letter in ("", "-") and not experts,
        "expert-latent": experts and model.moe_latent_size is not None,
        "shared": experts and "shared experts" in model.traits,
        "shared-gate": experts and model.moe_shared_expert_gate,
    }
    return {name for name, there in found.items() if there}


def sizes_of(model: ModelConfig) -> dict[str, int | None]:
    """What the letters in shapes stand for."""
    d = model.head_dim
    return {
        "V": model.padded_vocab_size,
        "P": model.max_position_embeddings,
        "D": model.hidden_size,
        "H": d,  # of one head
        "N": model.num_attention_heads,
        "Q": model.num_attention_heads * d,
        "K": model.num_query_groups * d,
        "QKV": model.qkv_rows,
        "F": model.ffn_hidden_size,
        "2F": 2 * (model.ffn_hidden_size or 0),
        "E": model.num_experts,
        "M": model.moe_ffn_hidden_size,
        "2M": 2 * (model.moe_ffn_hidden_size or 0),
        "Md": model.moe_latent_size or model.hidden_size,
        "S": model.moe_shared_expert_intermediate_size,
        "2S": 2 * (model.moe_shared_expert_intermediate_size or 0),
        "Kh": model.linear_num_key_heads,
        "Kd": model.linear_key_head_dim,
        "Ks": model.linear_keys,
        "Vh": model.linear_num_value_heads,
        "Vd": model.linear_value_head_dim,
        "Vs": model.linear_values,
        "Vk": model.linear_values // model.linear_num_key_heads,
        "R": model.linear_num_value_heads // model.linear_num_key_heads,
        "QKVs": 2 * model.linear_keys + model.linear_values,
        "QKVZs": 2 * model.linear_keys + 2 * model.linear_values,
        "2Vh": 2 * model.linear_num_value_heads,
        "C": model.linear_conv_kernel_dim,
        "Mh": model.mamba_num_heads,
        "Mi": model.mamba_inner,
        "Mm": model.mamba_maps,
        "Mc": model.mamba_inner + 2 * model.mamba_maps,
        "Mp": 2 * model.mamba_inner + 2 * model.mamba_maps + model.mamba_num_heads,
        "Mk": MAMBA_KERNEL,
        "2Q": 2 * model.num_attention_heads * d,
        "Lq": model.q_lora_rank,
        "Lk": model.kv_lora_rank,
        "Ld": model.kv_lora_rank + model.qk_pos_emb_head_dim,
        "Qk": model.num_attention_heads * (model.qk_head_dim + model.qk_pos_emb_head_dim),
        "KV": model.num_attention_heads * (model.qk_head_dim + model.v_head_dim),
        "1": 1,
        "3D": 3 * model.hidden_size,
    }
