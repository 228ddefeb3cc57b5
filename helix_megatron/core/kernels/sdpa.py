"""`torch.nn.functional.scaled_dot_product_attention` as an `AttentionKernel`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from helix_megatron.core.kernels.installed import installed_kernels
from helix_megatron.core.masks import AttentionMask


def sdpa(
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    """See `AttentionKernel`. Uses torch's causal and lower-right causal fast paths where the mask allows.

    On a GPU faster kernels are used where they are installed (`installed_kernels`).

    The latter gives NaN for queries that see no key, which plain causality has if queries outnumber keys.
    """
    queries, keys = q_BHLD.size(2), k_BGSD.size(2)
    sees_all = mask.hides_nothing(queries, keys)
    causal = not sees_all and mask.is_plain_causal(queries, keys) and queries <= keys
    shares = q_BHLD.size(1) != k_BGSD.size(1)
    shared: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": shares}
    fast = installed_kernels() if q_BHLD.is_cuda else None
    if fast and fast.wide and (sees_all or causal) and fast.takes(q_BHLD, v_BGSE, dropout):
        return fast.wide(q_BHLD, k_BGSD, v_BGSE, is_causal=causal, **shared)
    attn_mask: Tensor | None = None
    if causal and queries < keys:
        attn_mask = causal_lower_right(queries, keys)
    elif not sees_all and not causal:
        attn_mask = mask.visible(queries, keys, q_BHLD.device)
    with fast.flash_for(q_BHLD, dropout) if fast else nullcontext():
        return F.scaled_dot_product_attention(
            q_BHLD,
            k_BGSD,
            v_BGSE,
            attn_mask=attn_mask,
            is_causal=causal and attn_mask is None,
            **shared,
        )


def with_sinks(
    sinks_H: Tensor,
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    """`sdpa` with one more term exp(sink) in each head's softmax: a key of that score, whose value is 0."""
    queries, keys = q_BHLD.size(2), k_BGSD.size(2)
    seen = mask.visible(queries, keys, q_BHLD.device)
    bias = q_BHLD.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
    bias = bias[(None,) * (4 - bias.dim())]
    shape = (bias.size(0), sinks_H.numel(), queries)
    sinks = sinks_H.to(bias.dtype).view(1, -1, 1, 1)
    return F.scaled_dot_product_attention(
        q_BHLD,
        F.pad(k_BGSD, (0, 0, 0, 1)),
        F.pad(v_BGSE, (0, 0, 0, 1)),
        attn_mask=torch.cat((bias.expand(*shape, keys), sinks.expand(*shape, 1)), dim=-1),
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q_BHLD.size(1) != k_BGSD.size(1),
    )
