"""Attention over some of the keys, with the log-sum-exp that lets partial results be merged.

    o = softmax(scale · q kᵀ + bias) v          lse = log Σ exp(scale · q kᵀ + bias)

Over disjoint sets of keys, with results (o₁, lse₁), (o₂, lse₂), …, attention over all of them is

    Σ wₛ oₛ,  wₛ = exp(lseₛ − lse),  lse = log Σ exp lseₛ

(the online softmax of Milakov and Gimelshein 2018, arXiv 1805.02867, as flash decoding uses it).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from helix_megatron.core.kernels.softcap import grouped_scores

PartialKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
"""(q_BHLD, k_BGSD, v_BGSE, bias, scale) → (o_BHLE, lse_BHL).

`bias` is added to the scores, -inf where a key is hidden, broadcastable to [B, H, L, S] and of q's dtype. Where
a query sees no key, o is 0 and lse is anything finite or -inf: the caller knows these rows. lse is fp32, or
fp64 for fp64 inputs."""


def unfused(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """In plain torch, on any device: writes the scores to memory, in at least fp32.

    Args:
        softcap: makes softcap · tanh(score / softcap) of each score, before the bias.
    """
    scores = grouped_scores(q_BHLD, k_BGSD, scale, softcap)
    wide = scores.dtype
    if bias is not None:
        bias = bias.to(wide)[(None,) * (4 - bias.dim())]
        scores = (scores.flatten(1, 2) + bias).unflatten(1, (k_BGSD.size(1), -1))
    lse = scores.logsumexp(-1)
    # A row that sees nothing has lse = -inf, and -inf − -inf is no number.
    weights = (scores - lse.clamp(min=torch.finfo(wide).min).unsqueeze(-1)).exp()
    o_BGRLE = weights @ v_BGSE.to(wide).unsqueeze(2)
    return o_BGRLE.flatten(1, 2).to(q_BHLD.dtype), lse.flatten(1, 2)


def fused_on_cpu(
    q_BHLD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """torch's flash attention for CPUs, which returns the log-sum-exp beside the output."""
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHLD, k_BGSD, v_BGSE, attn_mask=bias, scale=scale
    )
    return o, lse


def partial_kernel(device: torch.device) -> PartialKernel:
    """The fastest of this module for a device."""
    has_flash = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return fused_on_cpu if device.type == "cpu" and has_flash else unfused


def with_sinks(o_THD: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to one more key in each head, of score `sinks_H` and value 0: o and lse with it."""
    sunk_TH = torch.logaddexp(lse_TH, sinks_H.to(lse_TH.dtype))
    return (o_THD * (lse_TH - sunk_TH).exp().unsqueeze(-1)).to(o_THD.dtype), sunk_TH


def merge(o_mTHD: Tensor, lse_mTH: Tensor) -> Tensor:
    """[m, T, H, D] and [m, T, H] → [T, H, D]: attention over all keys from m disjoint parts of them.

    A part without visible keys has lse -inf and weighs nothing; where all have, the result is 0.
    """
    weights_mTH = (lse_mTH - lse_mTH.amax(0).clamp(min=torch.finfo(lse_mTH.dtype).min)).exp()
    total_TH = weights_mTH.sum(0).clamp(min=torch.finfo(lse_mTH.dtype).tiny)
    return torch.einsum("mthd,mth->thd", o_mTHD, weights_mTH / total_TH)
