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


def tiny_config(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
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
