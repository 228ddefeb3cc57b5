"""`batch`: whole heads of 1/m of the sequences on each rank (Pope et al. 2022, arXiv 2211.05102, section 3.3).

The segments of a token's queries, keys and values go to the rank that keeps its sequence in one all-to-all, and
a second one brings segments of the output back. What is sent does not depend on the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from helix_megatron.core.caches.attention import (
    Scores,
    StepAttention,
    parts_of_members,
    uneven_swap,
    whole_keys,
    whole_queries,
)
from helix_megatron.core.caches.base import CacheLayout, Collective, DecodeShape

if TYPE_CHECKING:
    from torch import Tensor

    from helix_megatron.core.caches.pages import Piece


class BatchAttention(StepAttention):
    """Whole heads of some sequences: one all-to-all to their keeper, one back."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        m = self.layout.segments
        owners = np.concatenate([np.full(len(p.tokens), p.member) for p in pieces])
        order = np.argsort(owners, kind="stable")
        self._order = self._index(order)
        self._back = self._index(np.argsort(order))
        self._counts = np.bincount(owners, minlength=m).tolist()
        self._own = self._index(np.flatnonzero(owners == self.me))
        own = [piece for piece in pieces if piece.member == self.me]
        self._slots_t = self._slots(own, self.me)
        self._attention = self._work(own, self.me)

    def attend(self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, scores: Scores) -> Tensor:
        import torch

        whole, queries = self._is_whole(layer, k_TGC), q[0].numel()
        kv = () if whole else (torch.cat([k_TGC, v_TGC], dim=1).flatten(1),)
        came = self._to_keepers(torch.cat([q.flatten(1), *kv], dim=1)[self._order])
        q_tHD = whole_queries(came[..., :queries].unflatten(2, q.shape[1:]), self.layout)
        if whole:
            k_tGD, v_tGD = k_TGC[self._own], v_TGC[self._own]
        else:
            kv_mtGC = came[..., queries:].unflatten(2, (2 * k_TGC.size(1), -1))
            k_tGD, v_tGD = whole_keys(kv_mtGC, self.layout).chunk(2, dim=1)
        self.cache.write(layer, self._slots_t, k_tGD, v_tGD)
        o_tHD, _ = self._here(layer, q_tHD, scores)
        came = self._from_keepers(parts_of_members(o_tHD, self.layout).flatten(2))
        return came[self._back].unflatten(1, (q.size(1), -1))

    def _to_keepers(self, sent_TW: Tensor) -> Tensor:
        """[T, W] in the order of the keepers → [m, T', W]: every member's part of the tokens kept here."""
        from helix_megatron.core.collectives import gather
        from helix_megatron.core.observe import purpose

        m, own = self.layout.segments, self._counts[self.me]
        if self._gathers(sent_TW.nbytes, 2):
            first = sum(self._counts[: self.me])
            every = gather(sent_TW, self.group, purpose="exchange/batch")
            return every[:, first : first + own]
        with purpose("exchange/batch"):
            came = uneven_swap(sent_TW, self._counts, [own] * m, self.group)
        return came.view(m, own, sent_TW.size(1))

    def _from_keepers(self, sent_mtX: Tensor) -> Tensor:
        """[m, T', X] → [T, X]: this member's part of all tokens, in the order of the keepers."""
        import torch
        import torch.nn.functional as F

        from helix_megatron.core.collectives import gather
        from helix_megatron.core.observe import purpose

        m, own = sent_mtX.shape[:2]
        most = max(self._counts)
        if self._gathers(m * most * sent_mtX.size(2) * sent_mtX.element_size(), 2):
            padded = F.pad(sent_mtX, (0, 0, 0, most - own))
            every = gather(padded, self.group, purpose="exchange/batch")[:, self.me]
            return torch.cat([part[:n] for part, n in zip(every, self._counts, strict=True)])
        with purpose("exchange/batch"):
            return uneven_swap(sent_mtX.flatten(0, 1), [own] * m, self._counts, self.group)


class BatchCache(CacheLayout):
    name = "batch"
    summary = "whole heads of 1/m of the sequences on each rank"
    placement = "one"
    attention = BatchAttention

    def collectives(self, shape: DecodeShape) -> tuple[Collective, ...]:
        m, back = shape.layout.segments, shape.output_bytes
        there = shape.query_bytes + shape.key_value_bytes
        return (
            Collective("segments to sequences", "all-to-all", there, m * there),
            Collective("sequences to segments", "all-to-all", back, m * back),
        )

    def read_bytes(self, shape: DecodeShape) -> float:
        busiest = -(-shape.sequences // shape.layout.segments)
        return shape.cache_bytes() * busiest / shape.sequences
