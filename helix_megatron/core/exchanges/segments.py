"""Joining segments into whole heads and cutting heads into segments.

Ranks agree on any order of a head's dimensions as long as queries, keys and values share it. Segments joined
one after the other are such an order (`join`). Whole query heads come in canonical order, and keys and values
must then be brought into it too (`join_canonical`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from helix_megatron.core.layout import HeadLayout


def join(x_mSBGC: Tensor) -> Tensor:
    """[m, ..., C] → [..., m·C], dimensions segment by segment."""
    return x_mSBGC.movedim(0, -2).flatten(-2)


def cut(x_SBGD: Tensor, segments: int) -> Tensor:
    """[..., m·C] → [m, ..., C], the inverse of `join`."""
    return x_SBGD.unflatten(-1, (segments, -1)).movedim(-2, 0)


def join_canonical(x_mSBGC: Tensor, layout: HeadLayout) -> Tensor:
    """[m, ..., C] → [..., D], dimensions in canonical order."""
    pieces = layout.segment_pieces
    if len({length for _, length in pieces}) == 1:  # one strided copy
        return x_mSBGC.unflatten(-1, (len(pieces), -1)).movedim(0, -2).flatten(-3)
    parts = x_mSBGC.split([length // layout.segments for _, length in pieces], dim=-1)
    return torch.cat([join(part) for part in parts], dim=-1)


def heads_first(x_SBHD: Tensor) -> Tensor:
    """[S, B, H, D] → [B, H, S, D], a view: Megatron's order to the kernels'."""
    return x_SBHD.permute(1, 2, 0, 3)


def sequence_first(x_BHSD: Tensor) -> Tensor:
    """[B, H, S, D] → [S, B, H, D], a view: the kernels' order to Megatron's."""
    return x_BHSD.permute(2, 0, 1, 3)
