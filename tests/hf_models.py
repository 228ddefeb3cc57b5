"""Tiny random models of every Hugging Face family, made by `transformers` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZE: dict[str, Any] = {
    "vocab_size": 91,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
DELTA_NET = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}

LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    },
}
BALANCED = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 1,
}

PATTERN = {
    "layers_block_type": [
        *("linear_attention", "moe", "full_attention"),
        *("mlp", "linear_attention", "full_attention"),
    ],
    "head_dim": 16,
    "ssm_state_size": 6,
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "n_groups": 4,
    "time_step_min": 0.4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
}

HYBRID = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_n_groups": 4,
    "mamba_d_state": 6,
    "rms_norm_eps": 1e-5,
}
GRANITE_4 = (
    SIZE
    | HYBRID
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "shared_intermediate_size": 40,
        "position_embedding_type": "nope",
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.7,
    }
)

# name: (model_type, settings of its configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("llama", SIZE | {"num_key_value_heads": 4}),
    "llama 3": ("llama", SIZE | {"rope_parameters": LLAMA3_ROPE, "rms_norm_eps": 1e-5}),
    "llama with linear scaling": (
        "llama",
        SIZE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama with biases, tied": (
        "llama",
        SIZE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("mistral", SIZE | {"sliding_window": 7}),
    "qwen2": ("qwen2", SIZE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 with windows in some layers": (
        "qwen2",
        SIZE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", SIZE | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("gemma", SIZE | {"head_dim": 16, "num_key_value_heads": 1, "pad_token_id": 0}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 91,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mixtral": ("mixtral", SIZE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2 moe": ("qwen2_moe", SIZE | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen2 moe with dense layers": (
        "qwen2_moe",
        SIZE
        | EXPERTS
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
            "norm_topk_prob": True,
        },
    ),
    "qwen3 moe": ("qwen3_moe", SIZE | EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "llama with yarn": (
        "llama",
        SIZE
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "ministral": ("ministral", SIZE | MIXED | {"head_dim": 8}),
    "smollm3": (
        "smollm3",
        SIZE
        | {
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "tie_word_embeddings": True,
        },
    ),
    "granite": (
        "granite",
        SIZE
        | {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        },
    ),
    "ernie4 5": (
        "ernie4_5",
        SIZE | {"head_dim": 16, "use_bias": True, "tie_word_embeddings": False},
    ),
    "phi3": (
        "phi3",
        SIZE
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            "sliding_window": 9,
        },
    ),
    "starcoder2": ("starcoder2", SIZE | {"sliding_window": 9}),
    "granitemoe": (
        "granitemoe",
        SIZE
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.6,
        },
    ),
    "llama4": (
        "llama4_text",
        SIZE
        | {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "intermediate_size_mlp": 56,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 4,
        },
    ),
    "ministral3": (
        "ministral3",
        SIZE
        | {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 40,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "olmo2": ("olmo2", SIZE),
    "olmo3": (
        "olmo3",
        SIZE
        | MIXED
        | {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 1024,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            },
        },
    ),
    "minimax m2": (
        "minimax_m2",
        SIZE
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 8,
        },
    ),
    "glm4": ("glm4", SIZE | {"head_dim": 16, "attention_bias": True}),
    "exaone4": ("exaone4", SIZE | MIXED),
    "gemma3": (
        "gemma3_text",
        SIZE
        | MIXED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 6.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma2": (
        "gemma2",
        SIZE
        | {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "tie_word_embeddings": False,  # so that tokens are not those before them
            "final_logit_softcapping": 5.0,
        },
    ),
    "glm4 moe": (
        "glm4_moe",
        SIZE
        | BALANCED
        | {
            "head_dim": 16,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "gpt oss": (
        "gpt_oss",
        SIZE
        | MIXED
        | {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "qwen3 next": (
        "qwen3_next",
        SIZE | EXPERTS | DELTA_NET | {"shared_expert_intermediate_size": 40},
    ),
    "qwen3 5": ("qwen3_5_text", SIZE | DELTA_NET),
    "qwen3 5 moe": (
        "qwen3_5_moe_text",
        {k: size for k, size in SIZE.items() if k != "intermediate_size"}
        | EXPERTS
        | DELTA_NET
        | {"shared_expert_intermediate_size": 40},
    ),
    "nemotron h": (
        "nemotron_h",
        {k: size for k, size in SIZE.items() if k not in ("num_hidden_layers", "pad_token_id")}
        | PATTERN,
    ),
    "nemotron h with a latent of experts": (
        "nemotron_h",
        {k: size for k, size in SIZE.items() if k not in ("num_hidden_layers", "pad_token_id")}
        | PATTERN
        | {"moe_latent_size": 16},
    ),
    "granite 4": ("granitemoehybrid", GRANITE_4),
    "granite 4 with MLPs and one group": (
        "granitemoehybrid",
        GRANITE_4
        | {
            "num_local_experts": 0,
            "mamba_n_groups": 1,
            "mamba_d_state": 12,
            "tie_word_embeddings": True,
        },
    ),
    "granite 4 with attention alone": (
        "granitemoehybrid",
        GRANITE_4
        | {
            "layer_types": ["attention"] * 3,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
        },
    ),
    "bamba": (
        "bamba",
        SIZE | HYBRID | {"attn_layer_indices": [1], "mamba_n_groups": 1, "mamba_d_state": 12},
    ),
    "deepseek v3": ("deepseek_v3", SIZE | LATENT | BALANCED),
    "deepseek v2": (
        "deepseek_v2",
        SIZE
        | LATENT
        | BALANCED
        | {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "n_group": 1,
            "routed_scaling_factor": 1.5,
            # Without mscale_all_dim, by which transformers 5.2 does not scale the scores of this type.
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 40.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "deepseek v2 with groups": (
        "deepseek_v2",
        SIZE
        | LATENT
        | BALANCED
        | {"rope_parameters": None, "topk_method": "group_limited_greedy", "n_shared_experts": 2},
    ),
    "hunyuan": (
        "hunyuan_v1_dense",
        SIZE
        | {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 50.0,
                "factor": 1.0,
            },
        },
    ),
    "deepseek v3 with whole queries": (
        "deepseek_v3",
        SIZE
        | LATENT
        | BALANCED
        | {"q_lora_rank": None, "rope_parameters": None, "rms_norm_eps": 0.02},
    ),
    "qwen3 moe with a dense layer": (
        "qwen3_moe",
        SIZE | EXPERTS | {"num_hidden_layers": 3, "head_dim": 16, "mlp_only_layers": [1]},
    ),
}


def tokens(sequence: int = 24) -> torch.Tensor:
    """Token ids int64 [2, sequence]."""
    return torch.randint(91, (2, sequence), generator=torch.Generator().manual_seed(5))


def save(name: str, directory: Path) -> torch.Tensor:
    """Write model `name` as `save_pretrained` does, no weight 0 or 1; its logits [2, s, V] of `tokens()`."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        for parameter in model.parameters():
            start = parameter.detach().clone() if parameter.dim() == 1 else 0
            parameter.data.normal_(std=0.2).add_(start)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.2)
    model.save_pretrained(directory)
    with torch.no_grad():
        return load(directory)(tokens(), use_cache=False).logits


def load(directory: Path | str) -> Any:
    """A model of `transformers`, with attention that knows soft caps: 5.2 takes another and drops them."""
    from transformers import AutoModelForCausalLM

    capped = read_config(Path(directory)).get("attn_logit_softcapping") is not None
    how = {"attn_implementation": "eager"} if capped else {}
    return AutoModelForCausalLM.from_pretrained(directory, **how).eval()


def read_config(directory: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((directory / "config.json").read_text())


def config_of(name: str) -> dict[str, Any]:
    """What config.json of model `name` holds, without making the model."""
    from transformers import AutoConfig

    kind, settings = MODELS[name]
    return AutoConfig.for_model(kind, **settings).to_dict()
