"""Models by name, as model flags of the training script, with the source of their sizes."""

from __future__ import annotations

from typing import Any

from helix_megatron.model.presets import EXPERTS, PAPER

Flags = dict[str, Any]


def _gpt(*sizes: int, **others: Any) -> Flags:
    """A GPT of so many layers, hidden size, heads, FFN hidden size and vocabulary."""
    names = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "vocab_size")
    usual = {"untie_embeddings_and_output_weights": True, "disable_bias_linear": True}
    return dict(zip(names, sizes, strict=True)) | usual | others


def _gqa(heads: int) -> Flags:
    return {"group_query_attention": True, "num_query_groups": heads}


def _experts(number: int, topk: int, ffn: int, **others: Any) -> Flags:
    return {"num_experts": number, "moe_router_topk": topk, "moe_ffn_hidden_size": ffn} | others


LLAMA = {"swiglu": True, "normalization": "RMSNorm", "norm_epsilon": 1e-5}
LLAMA2 = LLAMA | {"rotary_base": 10000}
LLAMA3 = LLAMA | {"rotary_base": 500000}
LONG = LLAMA | {"rotary_base": 1000000}
MIXTRAL = LONG | _gqa(8)
QWEN3 = LONG | {"kv_channels": 128, "qk_layernorm": True, "norm_epsilon": 1e-6}
QWEN3_MOE = QWEN3 | _gqa(4)
GPT3 = {
    "disable_bias_linear": False,
    "untie_embeddings_and_output_weights": False,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 2048,
}
HF = "config.json on huggingface.co"
NEMO = "NVIDIA/NeMo-Framework-Launcher, launcher_scripts/conf/training"
NEMOTRON = f"{NEMO}; widths only: its activation, squared ReLU, is not here"

# The paper names no vocabulary; GPT-2's, padded. It is that of no claim: the layers are what is compared.
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_PAPER = {name: PAPER[name] for name in _SIZES} | {"vocab_size": 51200}

PRESETS: dict[str, tuple[Flags, str]] = {
    "paper-dense": (_PAPER, "the paper's 4 layers; its vocabulary is not given: 51200"),
    "paper-moe": (_PAPER | EXPERTS, "the paper's 4 layers of 8 experts, 2 of them for a token"),
    "llama-2-7b": (_gpt(32, 4096, 32, 11008, 32000, **LLAMA2), HF),
    "llama-2-13b": (_gpt(40, 5120, 40, 13824, 32000, **LLAMA2), HF),
    "llama-2-70b": (_gpt(80, 8192, 64, 28672, 32000, **LLAMA2, **_gqa(8)), HF),
    "llama-3-8b": (_gpt(32, 4096, 32, 14336, 128256, **LLAMA3, **_gqa(8)), HF),
    "llama-3-70b": (_gpt(80, 8192, 64, 28672, 128256, **LLAMA3, **_gqa(8)), HF),
    "llama-3-405b": (
        _gpt(126, 16384, 128, 53248, 128256, **LLAMA3, **_gqa(8)) | {"use_rope_scaling": True},
        "Llama-3.1-405B, " + HF,
    ),
    "qwen3-8b": (_gpt(36, 4096, 32, 12288, 151936, **QWEN3, **_gqa(8)), HF),
    "qwen3-32b": (_gpt(64, 5120, 64, 25600, 151936, **QWEN3, **_gqa(8)), HF),
    "qwen3-30b-a3b": (_gpt(48, 2048, 32, 6144, 151936, **QWEN3_MOE, **_experts(128, 8, 768)), HF),
    "qwen3-235b-a22b": (
        _gpt(94, 4096, 64, 12288, 151936, **QWEN3_MOE, **_experts(128, 8, 1536)),
        HF,
    ),
    "gemma-head-512": (
        _gpt(28, 3072, 8, 24576, 256000, kv_channels=512, geglu=True, **_gqa(4))
        | {"normalization": "RMSNorm", "untie_embeddings_and_output_weights": False},
        "Gemma 7B's widths with 8 heads of 512 dimensions on 4 key-value heads: no published model",
    ),
    "mixtral-8x7b": (_gpt(32, 4096, 32, 14336, 32000, **MIXTRAL, **_experts(8, 2, 14336)), HF),
    "mixtral-8x22b": (_gpt(56, 6144, 48, 16384, 32768, **MIXTRAL, **_experts(8, 2, 16384)), HF),
    "grok-1": (
        _gpt(64, 6144, 48, 32768, 131072, **LLAMA, **_gqa(8), **_experts(8, 2, 32768)),
        "xai-org/grok-1; the norms after its layers are not here",
    ),
    "deepseek-like": (
        _gpt(60, 7168, 128, 18432, 129280, kv_channels=128, **LLAMA, **_gqa(8))
        | _experts(256, 8, 2048, moe_shared_expert_intermediate_size=2048)
        | {"moe_layer_freq": [0] * 3 + [1] * 57},
        "DeepSeek-V3's widths and experts in 60 layers, with grouped-query in place of multi-latent "
        "attention, which Helix refuses",
    ),
    "gpt3-5b": (_gpt(24, 4096, 32, 16384, 51200, **GPT3), NEMO),
    "gpt3-20b": (_gpt(44, 6144, 48, 24576, 51200, **GPT3), NEMO),
    "gpt3-40b": (_gpt(48, 8192, 64, 32768, 51200, **GPT3), NEMO),
    "gpt3-175b": (_gpt(96, 12288, 96, 49152, 51200, **GPT3), NEMO),
    "nemotron-8b": (_gpt(32, 4096, 32, 16384, 256000, rotary_percent=0.5), NEMOTRON),
    "nemotron-15b": (_gpt(32, 6144, 48, 24576, 256000, rotary_percent=0.5, **_gqa(8)), NEMOTRON),
    "nemotron-22b": (_gpt(40, 6144, 48, 24576, 256000, rotary_percent=0.5), NEMOTRON),
    "nemotron-340b": (_gpt(96, 18432, 96, 73728, 256000, rotary_percent=0.5, **_gqa(8)), NEMOTRON),
}
