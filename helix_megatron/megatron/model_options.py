"""Options of the model that Megatron's GPT needs help with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from helix_megatron.core.kernels.softcap import soft_cap
from helix_megatron.model.description import ModelConfig
from helix_megatron.patching import temporarily


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


def apply_multipliers(model: Any, settings: ModelConfig) -> None:
    """Multiply embeddings and residuals of a GPTModel or HybridModel, and divide its logits."""
    scale_embeddings(model, settings.embedding_multiplier)
    scale_residuals(model, settings.residual_multiplier)
    divide_logits(model, settings.logits_scaling)


def scale_embeddings(model: Any, multiplier: float) -> None:
    """Multiply a model's word embeddings by `multiplier`, rounded to their dtype, in every forward pass.

    A hook on the embedding layer: so before dropout, after its reduction over tensor parallel ranks, and on
    whatever part of the sequence and whichever pipeline stage there is. Tied output weights stay as they are.
    """
    if multiplier == 1.0 or not hasattr(model, "embedding"):
        return

    def scale(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor(multiplier, dtype=output.dtype, device=output.device)

    model.embedding.word_embeddings.register_forward_hook(scale)


def scale_residuals(model: Any, multiplier: float) -> None:
    """Multiply what attention, Mamba and MLP of every layer add to the hidden states, in every forward pass."""
    if multiplier == 1.0:
        return

    def scale(
        module: Any, inputs: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if part is None else part * multiplier for part in output)

    for layer in model.decoder.layers:
        if hasattr(layer, "mixer"):  # of Mamba
            layer.mixer.register_forward_hook(scale)
            continue
        # Layers of a pattern have one of the two, and nothing in the other's place.
        attention = layer.self_attention
        if not isinstance(attention, IdentityOp):
            of_delta_net = hasattr(attention, "out_proj")
            projection = attention.out_proj if of_delta_net else attention.linear_proj
            projection.register_forward_hook(scale)
        if not isinstance(layer.mlp, IdentityOp):
            layer.mlp.register_forward_hook(scale)


def divide_logits(model: Any, divisor: float) -> None:
    """Divide logits, by dividing the hidden states that the output layer gets.

    So it holds for whoever computes logits from the last norm's output, on whatever rank of the last stage.
    """
    gpt_norm = getattr(model.decoder, "final_layernorm", None)
    norm = getattr(model.decoder, "final_norm", gpt_norm)  # HybridModel's
    if divisor != 1.0 and norm is not None:
        norm.register_forward_hook(lambda module, inputs, output: output / divisor)


def cap_logits(model: Any, cap: float | None) -> None:
    """Bound logits by c · tanh(logit / c), behind the output layer: each rank those of its own vocabulary rows.

    Cross entropy over vocabulary-parallel logits then has the loss and the gradients of capped logits. Who
    computes logits from the weights alone must cap them too, by the configuration's `final_logit_softcapping`.
    """
    layer = getattr(model, "output_layer", None)
    if cap is None or layer is None:
        return

    def bound(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        return soft_cap(logits, cap), bias

    layer.register_forward_hook(bound)


def count_groups_by_best(model: Any) -> None:
    """Let routers count a group of experts by its best one, as DeepSeek-V2's do (arXiv 2405.04434, 2.2.2).

    megatron-core counts it by the sum of its topk / group_topk best, in a function of a module that all routers
    share: another stands there while a router of this model chooses.
    """
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.routing = _with_best_groups(module.routing)


def _with_best_groups(routing: Callable[..., Any]) -> Callable[..., Any]:
    def route(*args: Any, **kwargs: Any) -> Any:
        with temporarily(moe_utils, group_limited_topk=_best_groups_topk):
            return routing(*args, **kwargs)

    return route


def _best_groups_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """The `topk` best of [num_tokens, num_experts] in the `group_topk` groups with the best one each."""
    grouped = scores.view(num_tokens, num_groups, -1)
    groups = grouped.amax(-1).topk(group_topk, dim=-1).indices
    left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, groups, value=False)
    rest = grouped.masked_fill(left_out.unsqueeze(-1), -torch.inf)
    best = rest.flatten(1).topk(topk, dim=-1)
    return best.values, best.indices


def leave_heads_without_rope_unnormalised(model: Any, layers: tuple[bool, ...]) -> None:
    """With `qk_l2_norm` layers without rotary embedding have no such norm, as in Llama 4.

    Args:
        model: a GPTModel.
        layers: which layers of the whole model have no rotary embedding.
    """
    for layer in model.decoder.layers:
        if layers[layer.layer_number - 1]:
            layer.self_attention.q_layernorm = layer.self_attention.k_layernorm = None
