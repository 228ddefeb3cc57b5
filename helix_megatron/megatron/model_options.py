"""Options of the model that Megatron's GPT needs help with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from torch import Tensor

from helix_megatron.model.description import ModelConfig


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and Gemma have it."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """The square of ReLU (arXiv 2109.08668), as Nemotron has it."""
    return F.relu(x).square()


def activation(model: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Activation of the MLP, of its gate where it is gated."""
    if model.swiglu:
        return F.silu
    if model.quick_geglu:
        return quick_gelu
    if model.squared_relu:
        return squared_relu
    return tanh_gelu if model.geglu or model.openai_gelu else F.gelu


def can_fuse_activation(model: ModelConfig) -> bool:
    """Whether Megatron's fused kernel for bias and activation computes `activation`.

    Its kernel for GELU computes the tanh approximation whatever it is asked for, so the same flags would mean
    one model on a GPU and another on a CPU.
    """
    plain = model.activation_func_clamp_value is None and model.glu_linear_offset == 0
    return activation(model) is F.silu and plain


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


def scale_residuals(model: Any, multiplier: float) -> None:
    """Multiply what attention and MLP of every layer add to the hidden states, in every forward pass."""
    if multiplier == 1.0:
        return

    def scale(
        module: Any, inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if part is None else part * multiplier for part in output)

    for layer in model.decoder.layers:
        layer.self_attention.linear_proj.register_forward_hook(scale)
        layer.mlp.register_forward_hook(scale)


def divide_logits(model: Any, divisor: float) -> None:
    """Divide logits, by dividing the hidden states that the output layer gets.

    So it holds for whoever computes logits from the last norm's output, on whatever rank of the last stage.
    """
    norm = getattr(model.decoder, "final_layernorm", None)
    if divisor != 1.0 and norm is not None:
        norm.register_forward_hook(lambda module, inputs, output: output / divisor)


def leave_heads_without_rope_unnormalised(model: Any, layers: tuple[bool, ...]) -> None:
    """With `qk_l2_norm` layers without rotary embedding have no such norm, as in Llama 4.

    Args:
        model: a GPTModel.
        layers: which layers of the whole model have no rotary embedding.
    """
    for layer in model.decoder.layers:
        if layers[layer.layer_number - 1]:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = None
