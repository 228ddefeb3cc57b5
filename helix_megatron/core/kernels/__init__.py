"""Local attention: what one rank computes on whole (or cut) heads, with nothing to exchange.

A kernel is any callable with the signature of `AttentionKernel`. `sdpa` is the default; pass another to
`partitioned_attention` or to `helix_layer_spec`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from helix_megatron.core.masks import AttentionMask


CAPPED_QUERIES = 256
"""Queries that attention with soft caps takes at a time (`softcap`)."""


class AttentionKernel(Protocol):
    """softmax(scale · q kᵀ, masked) v."""

    def __call__(
        self,
        q_BHLD: Tensor,
        k_BGSD: Tensor,
        v_BGSE: Tensor,
        *,
        mask: AttentionMask,
        scale: float,
        dropout: float,
    ) -> Tensor:
        """[B, H, L, E].

        B batch, H query heads, G key-value heads (G divides H; head x attends to x // (H/G)), L queries,
        S keys, D dimensions of queries and keys, E of values. A query that sees no key gives zeros.
        `dropout` is the probability of dropping an attention weight, 0 outside training.
        """
