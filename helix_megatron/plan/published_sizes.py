"""Models of 2025 and 2026 by name: the sizes of their config.json on huggingface.co, under its own keys."""

from __future__ import annotations

from typing import Any


def _config(
    model_type: str, sizes: tuple[int, ...], vocabulary: int, **others: Any
) -> dict[str, Any]:
    """Layers, hidden size, query heads, key-value heads, dimensions of a head."""
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    usual = {"model_type": model_type, "vocab_size": vocabulary}
    return usual | dict(zip(names, sizes, strict=True)) | others


def _qwen3_5(layers: int, hidden: int, heads: int, kv: int, value_heads: int, **ffn: int) -> Any:
    linear = {
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
    }
    return _config("qwen3_5_text", (layers, hidden, heads, kv, 256), 248320, **linear, **ffn)


def _qwen3_5_moe(*sizes: int, experts: int, topk: int, ffn: int) -> Any:
    own = {"num_experts": experts, "num_experts_per_tok": topk, "moe_intermediate_size": ffn}
    dense = _qwen3_5(*sizes, **own, shared_expert_intermediate_size=ffn)
    return dense | {"model_type": "qwen3_5_moe_text"}


def _nemotron(
    pattern: str, hidden: int, heads: int, ffn: int, experts: int, topk: int, **others: int
) -> Any:
    own = {
        "hybrid_override_pattern": pattern,
        "intermediate_size": ffn,
        "moe_intermediate_size": ffn,
        "moe_shared_expert_intermediate_size": 2 * ffn,
        "n_routed_experts": experts,
        "num_experts_per_tok": topk,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
    }
    sizes = len(pattern), hidden, heads, 2, 128
    return _config("nemotron_h", sizes, 131072, **own, **others)


def _windows(windowed: int, times: int) -> list[str]:
    return (["sliding_attention"] * windowed + ["full_attention"]) * times


def _gpt_oss(layers: int, experts: int) -> Any:
    own = {"num_local_experts": experts, "num_experts_per_tok": 4, "intermediate_size": 2880}
    windows = {"sliding_window": 128, "layer_types": _windows(1, layers // 2)}
    return _config("gpt_oss", (layers, 2880, 64, 8, 64), 201088, **own, **windows)


def _latent(heads: int, experts: int, dense: int, vocabulary: int) -> Any:
    own = {
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": dense,
    }
    return _config("deepseek_v3", (61, 7168, heads, heads, 128), vocabulary, **own)


GEMMA4 = {
    "attention_k_eq_v": True,
    "global_head_dim": 512,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
}
NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA = "MEMEMEM*EMEMEM*EMEMEMEM*" + "EMEMEMEM*EMEMEM*EMEMEMEM*" * 3 + "EMEMEMEME"

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3.5-27b": _qwen3_5(64, 5120, 24, 4, 48, intermediate_size=17408),
    "qwen3.5-35b-a3b": _qwen3_5_moe(40, 2048, 16, 2, 32, experts=256, topk=8, ffn=512),
    "qwen3.5-122b-a10b": _qwen3_5_moe(48, 3072, 32, 2, 64, experts=256, topk=8, ffn=1024),
    "qwen3.5-397b-a17b": _qwen3_5_moe(60, 4096, 32, 2, 64, experts=512, topk=10, ffn=1024),
    "nemotron-3-nano": _nemotron(NANO, 2688, 32, 1856, 128, 6, mamba_num_heads=64),
    "nemotron-3-super": _nemotron(
        SUPER, 4096, 32, 2688, 512, 22, mamba_num_heads=128, moe_latent_size=1024
    ),
    "nemotron-3-ultra": _nemotron(
        ULTRA, 8192, 64, 5120, 512, 22, mamba_num_heads=256, moe_latent_size=2048
    ),
    "gemma-4-26b-a4b": _config(
        "gemma4_text",
        (30, 2816, 16, 8, 256),
        262144,
        num_global_key_value_heads=2,
        layer_types=_windows(5, 5),
        intermediate_size=2112,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        **GEMMA4,
    ),
    "gemma-4-31b": _config(
        "gemma4_text",
        (60, 5376, 32, 16, 256),
        262144,
        num_global_key_value_heads=4,
        layer_types=_windows(5, 10),
        intermediate_size=21504,
        **GEMMA4,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "glm-4.5": _config(
        "glm4_moe",
        (92, 5120, 96, 8, 128),
        151552,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=3,
        use_qk_norm=True,
    ),
    "minimax-m2": _config(
        "minimax_m2",
        (62, 3072, 48, 8, 128),
        200064,
        intermediate_size=1536,
        num_local_experts=256,
        num_experts_per_tok=8,
        rotary_dim=64,
    ),
    "llama-4-scout": _config(
        "llama4_text",
        (48, 5120, 40, 8, 128),
        202048,
        intermediate_size=8192,
        num_local_experts=16,
        num_experts_per_tok=1,
    ),
    "deepseek-v3": _latent(128, 256, 3, 129280),
    "kimi-k2": _latent(64, 384, 1, 163840),
}
