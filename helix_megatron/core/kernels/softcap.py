"""Attention with soft caps as an `AttentionKernel`: softmax(c · tanh(scale · q kᵀ / c), masked) v.

torch's `scaled_dot_product_attention` knows no cap, which Gemma 2 has. Here some queries at a time meet the
keys that any of them sees, and the backward pass computes their scores again: these take memory for the few
queries, not for the sequence.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helix_megatron.core.kernels import CAPPED_QUERIES
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.masks import AttentionMask, masked_softmax
from helix_megatron.errors import HelixError

if TYPE_CHECKING:
    from helix_megatron.core.kernels import AttentionKernel


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap), between -cap and cap, of scores or logits; `x` itself where there is no cap."""
    return x if cap is None else cap * (x / cap).tanh()


def grouped_scores(q_BHLD: Tensor, k_BGSD: Tensor, scale: float, cap: float | None) -> Tensor:
    """[B, G, H/G, L, S]: scale · q kᵀ with a soft cap, in at least fp32."""
    wide = torch.promote_types(q_BHLD.dtype, torch.float32)
    q_BGRLD = q_BHLD.to(wide).unflatten(1, (k_BGSD.size(1), -1)) * scale
    return soft_cap(q_BGRLD @ k_BGSD.to(wide).transpose(2, 3).unsqueeze(2), cap)


def capped(
    cap: float,
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    """See `AttentionKernel`; scores are computed in at least fp32. `cap` is above 0."""
    queries, keys = q_BHLD.size(2), k_BGSD.size(2)
    outputs = []
    for start in range(0, queries, CAPPED_QUERIES):
        stop = min(start + CAPPED_QUERIES, queries)
        part, seen = mask.block(start, stop, queries, keys)
        block = (q_BHLD[:, :, start:stop], k_BGSD[:, :, seen], v_BGSE[:, :, seen])
        outputs.append(
            checkpoint(
                _attend,
                *(*block, part, scale, cap, dropout),
                use_reentrant=False,
                preserve_rng_state=dropout > 0,
            )
        )
    return torch.cat(outputs, dim=2)


def with_cap(kernel: AttentionKernel, cap: float | None) -> AttentionKernel:
    """The kernel of scores with such a cap; `kernel` itself where there is none.

    Raises:
        HelixError: `kernel` is somebody's own, which would drop the cap.
    """
    if cap is None:
        return kernel
    if kernel is not sdpa:
        name = getattr(kernel, "__name__", type(kernel).__name__)
        raise HelixError(
            f"attn_logit_softcapping is {cap}, which kernel {name} does not know. Leave the kernel out."
        )
    return functools.partial(capped, cap)


def _attend(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: AttentionMask,
    scale: float,
    cap: float,
    dropout: float,
) -> Tensor:
    scores_BGRLS = grouped_scores(q_BHLD, k_BGSD, scale, cap)
    weights_BHLS = masked_softmax(scores_BGRLS.flatten(1, 2), mask).to(v_BGSE.dtype)
    if dropout:
        weights_BHLS = F.dropout(weights_BHLS, p=dropout)
    return (weights_BHLS.unflatten(1, (k_BGSD.size(1), -1)) @ v_BGSE.unsqueeze(2)).flatten(1, 2)
