"""`torch.nn.functional.scaled_dot_product_attention` as an `AttentionKernel`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

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

    The latter gives NaN for queries that see no key, which plain causality has if queries outnumber keys.
    """
    queries, keys = q_BHLD.size(2), k_BGSD.size(2)
    attn_mask: Tensor | None = None
    is_causal = False
    if mask.hides_nothing(queries, keys):
        pass
    elif mask.is_plain_causal(queries, keys) and queries <= keys:
        is_causal = queries == keys
        attn_mask = None if is_causal else causal_lower_right(queries, keys)
    else:
        attn_mask = mask.visible(queries, keys, q_BHLD.device)
    return F.scaled_dot_product_attention(
        q_BHLD,
        k_BGSD,
        v_BGSE,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q_BHLD.size(1) != k_BGSD.size(1),
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
