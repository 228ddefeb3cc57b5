"""Ordinary attention on one rank, in plain torch, written to be obviously right.

It imports nothing of the package, so that agreeing with it means something.

Letters: S positions, B batch, H query heads, G key-value heads, D head dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q_SBHD: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    hidden: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """[L, B, H·D]; one (query, head) at a time in meaning: softmax over the keys that the query sees.

    A bias [1, H, L, S] is added to the scores; sinks [H] are the score of one more key, whose value is 0.
    """
    queries, heads, dim = q_SBHD.size(0), q_SBHD.size(2), q_SBHD.size(3)
    keys, share = k_SBGD.size(0), heads // k_SBGD.size(2)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    visible = torch.ones(queries, keys, dtype=torch.bool)
    for query in range(queries):
        position = query + keys - queries
        for key in range(keys):
            if causal and key > position:
                visible[query, key] = False
            if window and window[0] >= 0 and key < position - window[0]:
                visible[query, key] = False
            if window and window[1] >= 0 and key > position + window[1]:
                visible[query, key] = False
    outputs = []
    for head in range(heads):
        q, k, v = q_SBHD[:, :, head], k_SBGD[:, :, head // share], v_SBGD[:, :, head // share]
        scores = torch.einsum("qbd,kbd->bqk", q, k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, head]
        seen = visible.expand_as(scores)
        if hidden is not None:
            of_head = hidden[:, head if hidden.size(1) > 1 else 0]
            seen = seen & ~of_head.expand_as(scores)
        some = seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen & some, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].expand(*scores.shape[:2], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., :keys] * some
        outputs.append(torch.einsum("bqk,kbd->qbd", weights, v))
    return torch.cat(outputs, dim=-1)


def rotary_angles(positions: int, dims: int, interleaved: bool, base: float = 10000.0) -> Tensor:
    """fp64 [positions, 1, 1, dims]: Megatron's table of angles."""
    frequency = base ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    pairs = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angle, angle], dim=-1)
    return pairs[:, None, None, :]


def rotate(x_SBHD: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding of the leading dimensions; pairs (2k, 2k+1) interleaved, else (k, k + dims/2)."""
    dims = table.size(-1)
    x, rest = x_SBHD[..., :dims], x_SBHD[..., dims:]
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    else:
        half = dims // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    table = table.to(x.dtype)
    return torch.cat([x * table.cos() + turned * table.sin(), rest], dim=-1)


def normalize(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm, RMSNorm or L2 norm over the last dimension."""
    if kind == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias
