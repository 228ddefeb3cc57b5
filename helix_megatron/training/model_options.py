"""Options of the model that Megatron's GPT needs help with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helix_megatron.model.description import ModelConfig


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and Gemma have it."""
    return F.gelu(x, approximate="tanh")


def activation(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Activation of the MLP, of its gate where it is gated."""
    if model.swiglu:
        return F.silu
    return tanh_gelu if model.geglu or model.openai_gelu else F.gelu


def can_fuse_activation(model: ModelConfig) -> bool:
    """Whether Megatron's fused kernel for bias and activation computes `activation`.

    Its kernel for GELU computes the tanh approximation whatever it is asked for, so the same flags would mean
    one model on a GPU and another on a CPU.
    """
    return activation(model) is F.silu


def scale_embeddings(model: Any, multiplier: float) -> None:
    """Multiply a GPTModel's word embeddings by `multiplier`, rounded to their dtype, in every forward pass.

    A hook on the embedding layer: so before dropout, after its reduction over tensor parallel ranks, and on
    whatever part of the sequence and whichever pipeline stage there is. Tied output weights stay as they are.
    """
    if multiplier == 1.0 or not hasattr(model, "embedding"):
        return

    def scale(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(multiplier, dtype=output.dtype, device=output.device)

    model.embedding.word_embeddings.register_forward_hook(scale)
