"""Tiny random Hugging Face models of every family that can be cut, norms and biases randomised too."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}

# family → (configuration class, settings). Query heads 4 are dealt whole on 2 and 4 ranks, 2 are cut.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, cut queries": ("LlamaConfig", {"num_attention_heads": 2}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": (
        "Qwen2Config",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", {"attention_bias": True}),
    "qwen3, cut queries": ("Qwen3Config", {"num_attention_heads": 2}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True, "vocab_size": 97}),
    "mixtral": (
        "MixtralConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "intermediate_size": 64,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **EXPERTS,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 1}),
}

_MOE = {**EXPERTS, "n_routed_experts": 4, "num_local_experts": 4}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_chunk_size": 4,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 8,
}
_NEMOTRON = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "chunk_size": 4,
}
# Cut by the form of their modules; query heads stay whole.
BY_FORM: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5TextConfig", _LINEAR),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 24},
    ),
    "gpt_oss": ("GptOssConfig", {**_MOE, **_MIXED}),
    "gemma2": ("Gemma2Config", _MIXED),
    "gemma3": ("Gemma3TextConfig", _MIXED),
    "gemma4": ("Gemma4TextConfig", {**_MIXED, "hidden_size_per_layer_input": 0}),
    "gemma4, experts": (  # as Gemma 4 26B-A4B: global layers have fewer, wider heads, and keys for values
        "Gemma4TextConfig",
        {
            **EXPERTS,
            **_MIXED,
            "hidden_size": 64,
            "hidden_size_per_layer_input": 0,
            "num_key_value_heads": 4,
            "num_global_key_value_heads": 2,
            "global_head_dim": 32,
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma4, shared keys": (  # as Gemma 4 E2B: the last layers attend to keys of those before
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 6,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "use_double_wide_mlp": True,
            "global_head_dim": 32,
        },
    ),
    "nemotron_h": ("NemotronHConfig", _NEMOTRON),
    "nemotron_h, latent experts": (
        "NemotronHConfig",
        {**_NEMOTRON, "hidden_size": 64, "moe_latent_size": 16},
    ),
    "glm4": ("Glm4Config", {"attention_bias": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {**_MOE, "use_qk_norm": True, "first_k_dense_replace": 1, "attention_bias": True},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        {**_MOE, "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    ),
    "llama4": (
        "Llama4TextConfig",
        {**_MOE, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0], "floor_scale": 8},
    ),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.3, "residual_multiplier": 0.7}),
    "granitemoe": ("GraniteMoeConfig", _MOE),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _MIXED),
    "starcoder2": ("Starcoder2Config", {"use_bias": True}),
    "ministral": ("MinistralConfig", _MIXED),
    "ministral3": (
        "Ministral3Config",
        {
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1,
            }
        },
    ),
    "exaone4": ("Exaone4Config", _MIXED),
    "falcon_h1": (
        "FalconH1Config",
        {**_MAMBA, "mamba_rms_norm": True, "ssm_multipliers": [0.5, 0.7, 1.1, 1.3, 0.9]},
    ),
    "apertus": ("ApertusConfig", {}),
    "bamba": ("BambaConfig", {**_MAMBA, "attn_layer_indices": [1]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_MOE,
            **_MAMBA,
            "shared_intermediate_size": 24,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "ernie4_5": ("Ernie4_5Config", {"use_bias": True}),
    "hunyuan": ("HunYuanDenseV1Config", {}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", {**_MOE, "sliding_window": 6}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "deepseek_v2": ("DeepseekV2Config", {**_MOE, **_LATENT}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_MOE, **_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
}


def tiny_config(family: str, **changes: Any) -> Any:
    name, settings = (FAMILIES | BY_FORM)[family]
    return getattr(transformers, name)(**{**COMMON, **settings, **changes})


def tiny_model(family: str, *, seed: int = 3, dtype: torch.dtype = torch.float32, **changes: Any):
    """The same weights on every rank; every parameter is random, so that none can be dropped unseen."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    randomize(model)
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        if parameter.dim() == 1:  # norms and biases
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise * (1.5 / parameter.size(-1) ** 0.5))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape))


def tokens(batch: int = 2, length: int = 12, seed: int = 5) -> Tensor:
    """int64 [batch, length], no padding."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=random)


def left_padded(batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens and the attention mask of a batch whose first sequence is shorter by 5."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    return ids, mask


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest deviation in units of the largest value; infinite for NaN."""
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    return float("inf") if math.isnan(error) else error
