"""A model type that no release knows yet, with attention layers of a class that a test chooses."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny_transformers import tiny_config
from transformers.models.llama import modeling_llama


class TomorrowConfig(transformers.LlamaConfig):
    model_type = "tomorrow"


class TomorrowAttention(modeling_llama.LlamaAttention):
    """Of the known form, with another name and a scale of its own."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling *= 1.3


def tomorrow(attention: type[TomorrowAttention]) -> Any:
    """A Llama of that type in eval mode, the same weights every time."""
    config = TomorrowConfig(**tiny_config("llama").to_dict() | {"model_type": "tomorrow"})
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn = attention(config, number)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    return model.eval()
