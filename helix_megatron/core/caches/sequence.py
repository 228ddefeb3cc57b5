"""`sequence`: whole heads of 1/m of the positions on each rank, block after block in turn.

Every rank gets the queries, attends to its positions, and partial outputs are merged by log-sum-exp. Helix
parallelism (arXiv 2507.07120) does this with replicated projections; here they stay cut m ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from helix_megatron.core.caches.attention import (
    Scores,
    StepAttention,
    concatenated,
    parts_of_members,
    uneven_swap,
    whole_keys,
    whole_queries,
)
from helix_megatron.core.caches.base import CacheLayout, Collective, DecodeShape

if TYPE_CHECKING:
    from torch import Tensor

    from helix_megatron.core.caches.pages import Piece


class SequenceAttention(StepAttention):
    """Whole heads of some positions: queries to everybody, partial outputs back, merged by log-sum-exp."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        owners, slots = [], []
        for piece in pieces:
            positions = np.arange(piece.start, piece.stop)
            owner = self.tables.owners(piece.sequence, positions)
            owners.append(owner)
            slots.append(self.tables.slots(piece.sequence, self.me, positions[owner == self.me]))
        owner = np.concatenate(owners)
        self._tokens_of = [
            self._index(np.flatnonzero(owner == t)) for t in range(self.layout.segments)
        ]
        self._slots_t = self._index(concatenated(slots))
        self._attention = self._work(pieces, self.me)

    def attend(self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, scores: Scores) -> Tensor:
        import torch

        from helix_megatron.core.kernels.partial import merge

        m, tokens = self.layout.segments, q.size(0)
        if self._is_whole(layer, k_TGC):
            own = self._tokens_of[self.me]
            q_mThd, k_tGD, v_tGD = self._queries(q), k_TGC[own], v_TGC[own]
        else:
            q_mThd, kv_mtGC = self._spread(q, torch.cat([k_TGC, v_TGC], dim=1))
            k_tGD, v_tGD = whole_keys(kv_mtGC, self.layout).chunk(2, dim=1)
        self.cache.write(layer, self._slots_t, k_tGD, v_tGD)
        q_THD = whole_queries(q_mThd, self.layout)
        o_THD, lse_TH = self._here(layer, q_THD, scores, sinks=self.me == 0)

        o_mThd = parts_of_members(o_THD.to(lse_TH.dtype), self.layout)
        if self.layout.query_layout == "heads":
            lse_mTh = lse_TH.view(tokens, m, -1).transpose(0, 1)
        else:
            lse_mTh = lse_TH.expand(m, *lse_TH.shape)
        partial = torch.cat([o_mThd, lse_mTh.unsqueeze(-1)], dim=-1)
        partial = self._swap(partial, "exchange/sequence")
        return merge(partial[..., :-1], partial[..., -1]).to(q.dtype)

    def _queries(self, q: Tensor) -> Tensor:
        """Every member's queries, [m, *q]."""
        from helix_megatron.core.collectives import gather

        return gather(q, self.group, purpose="exchange/sequence")

    def _spread(self, q: Tensor, kv_TGC: Tensor) -> tuple[Tensor, Tensor]:
        """`_queries`, and every member's keys and values [m, T', 2G, C] of positions kept here."""
        import torch

        from helix_megatron.core.collectives import gather
        from helix_megatron.core.observe import purpose

        m, own = self.layout.segments, self._slots_t.numel()
        flat, width = q.numel(), kv_TGC[0].numel()
        if self._gathers(q.nbytes, m):
            sent = torch.cat([q.flatten(1), kv_TGC.flatten(1)], dim=1)
            every = gather(sent, self.group, purpose="exchange/sequence")
            kv = every[:, self._tokens_of[self.me], q[0].numel() :]
            return every[..., : q[0].numel()].unflatten(2, q.shape[1:]), kv.unflatten(
                2, kv_TGC.shape[1:]
            )
        parts = [
            p for tokens in self._tokens_of for p in (q.reshape(-1), kv_TGC[tokens].reshape(-1))
        ]
        to = [flat + tokens.numel() * width for tokens in self._tokens_of]
        each = flat + own * width
        with purpose("exchange/sequence"):
            came = uneven_swap(torch.cat(parts), to, [each] * m, self.group).view(m, each)
        return came[:, :flat].unflatten(1, q.shape), came[:, flat:].unflatten(
            1, (own, *kv_TGC.shape[1:])
        )


class SequenceCache(CacheLayout):
    name = "sequence"
    summary = "whole heads of 1/m of the positions on each rank, outputs merged by log-sum-exp"
    placement = "dealt"
    attention = SequenceAttention

    def collectives(self, shape: DecodeShape) -> tuple[Collective, ...]:
        m, q, kv = shape.layout.segments, shape.query_bytes, shape.key_value_bytes
        heads, dims = shape.output_shape
        per_token = heads * (dims + 1)  # outputs with their log-sum-exp
        outputs = m * shape.sequences * per_token * shape.wide_size
        return (
            Collective("whole queries, new keys, values", "all-to-all", m * q + kv, m * (q + kv)),
            Collective("partial outputs", "all-to-all", outputs, m * outputs),
        )
