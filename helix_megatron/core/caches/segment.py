"""`segment`: segments of all heads, sequences and positions: what megatron-core's static cache holds, too.

Partial scores are summed over the head group, then the softmax is local. What is sent grows with the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from helix_megatron.core.caches.attention import Scores, StepAttention
from helix_megatron.core.caches.base import CacheLayout, Collective, DecodeShape
from helix_megatron.core.masks import AttentionMask

if TYPE_CHECKING:
    from torch import Tensor, device

    from helix_megatron.core.caches.paged import Window
    from helix_megatron.core.caches.pages import Piece


class SegmentAttention(StepAttention):
    """Segments of everything: partial scores are summed over the group, then the softmax is local."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        dims = [self.layout.segment_dims(member) for member in range(self.layout.segments)]
        self._dims = self._index(np.concatenate(dims))

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._slots_T = self._slots(pieces, 0)
        size = self.tables.page_size
        # Of each piece: a run of slots, read where it lies, or pages to copy.
        self._keys: list[slice | Tensor] = []
        for piece in pieces:
            pages = self.tables.pages(piece.sequence, 0)[: -(-piece.stop // size)]
            if pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all():
                self._keys.append(slice(pages[0] * size, pages[0] * size + piece.stop))
            else:
                self._keys.append(self._index(np.asarray(pages)))
        self._masks = {window: self._masks_of(window) for window in self.windows}

    def attend(self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, scores: Scores) -> Tensor:
        import torch

        from helix_megatron.core.collectives import all_reduce
        from helix_megatron.core.kernels.partial import with_sinks
        from helix_megatron.core.kernels.softcap import soft_cap

        window = scores.window
        self.cache.write(layer, self._slots_T, k_TGC, v_TGC)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_TGRC = (self._segments(q).to(wide) * scores.scale).unflatten(1, (k_TGC.size(1), -1))
        partial, row = [], 0
        for piece, keys in zip(self._pieces, self._keys, strict=True):
            k_SGC = _read(self.cache.k[layer], keys, piece.stop).to(wide)
            q_LGRC = q_TGRC[row : row + len(piece.tokens)]
            partial.append(torch.einsum("lgrc,sgc->grls", q_LGRC, k_SGC))
            row += len(piece.tokens)
        summed = all_reduce(
            torch.cat([part.reshape(-1) for part in partial]),
            self.group,
            purpose="exchange/segment",
        )
        summed = soft_cap(summed, scores.softcap)
        outputs, at = [], 0
        masks = self._masks.get(window) or self._masks_of(window)
        for piece, keys, own, hidden in zip(self._pieces, self._keys, partial, masks, strict=True):
            s_GRLS = summed[at : at + own.numel()].view_as(own)
            at += own.numel()
            if hidden is not None:
                s_GRLS.masked_fill_(hidden, float("-inf"))
            v_SGC = _read(self.cache.v[layer], keys, piece.stop).to(wide)
            o_LHC = torch.einsum("grls,sgc->lgrc", s_GRLS.softmax(-1), v_SGC).flatten(1, 2)
            if scores.sinks_H is not None:
                lse_LH = s_GRLS.logsumexp(-1).flatten(0, 1).t()
                o_LHC, _ = with_sinks(o_LHC, lse_LH, scores.sinks_H)
            outputs.append(o_LHC)
        return self._own_heads(torch.cat(outputs).to(q.dtype))

    def _masks_of(self, window: Window) -> list[Tensor | None]:
        """What is hidden from each piece; None where nothing is."""
        return [
            _hidden(piece, window, self.device)
            if len(piece.tokens) > 1 or window is not None
            else None
            for piece in self._pieces
        ]

    def _segments(self, q: Tensor) -> Tensor:
        """This rank's segments [T, H, C] of all queries of the group."""
        if self.layout.query_layout == "segments":
            return q
        q_mThC = q[..., self._dims].unflatten(2, (self.layout.segments, -1)).permute(2, 0, 1, 3)
        q_mThC = self._swap(q_mThC, "exchange/segment")
        return q_mThC.transpose(0, 1).flatten(1, 2)

    def _own_heads(self, o_THC: Tensor) -> Tensor:
        """Where queries are dealt whole: this rank's heads [T, h/p, D] of segments of all."""
        from helix_megatron.core.exchanges.segments import join_canonical

        if self.layout.query_layout == "segments":
            return o_THC
        o_mThC = o_THC.unflatten(1, (self.layout.segments, -1)).transpose(0, 1)
        o_mThC = self._swap(o_mThC, "exchange/segment")
        return join_canonical(o_mThC, self.layout)


def _read(pool_PSGC: Tensor, keys: slice | Tensor, length: int) -> Tensor:
    """The first `length` keys or values [S, G, C] of a sequence, from a run of slots or from pages."""
    if isinstance(keys, slice):
        return pool_PSGC.flatten(0, 1)[keys]
    return pool_PSGC.index_select(0, keys).flatten(0, 1)[:length]


def _hidden(piece: Piece, window: Window, device: device) -> Tensor:
    mask = AttentionMask(causal=True, window=window)
    return ~mask.visible(piece.stop - piece.start, piece.stop, device)


class SegmentCache(CacheLayout):
    name = "segment"
    summary = "segments of everything on each rank, partial scores all-reduced"
    placement = "all"
    attention = SegmentAttention

    def collectives(self, shape: DecodeShape) -> tuple[Collective, ...]:
        m, q = shape.layout.segments, shape.query_bytes
        scores = Collective("partial scores", "all-reduce", self.score_bytes(shape))
        if shape.layout.query_layout == "segments":
            return (scores,)
        return (
            Collective("heads to segments", "all-to-all", q, m * q),
            scores,
            Collective("segments to heads", "all-to-all", q, m * q),
        )

    def score_bytes(self, shape: DecodeShape) -> float:
        scores = shape.sequences * shape.layout.group_heads * shape.context
        return scores * shape.wide_size
