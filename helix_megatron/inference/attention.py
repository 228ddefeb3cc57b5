"""The attention of a step over the ranks of a head group, for each cache layout.

Letters of shapes: T tokens of the step, T' those whose keys and values this rank keeps; H, G query and
key-value heads, D dimensions, C = D/m of a segment; m ranks of the head group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.collectives import all_reduce, gather, swap
from helix_megatron.exchanges.segments import join, join_canonical
from helix_megatron.inference.paged import LocalPiece, PagedCache, PagedWork, Window
from helix_megatron.inference.pages import PageBook
from helix_megatron.inference.step import Piece
from helix_megatron.kernels.partial import merge
from helix_megatron.layout import HeadLayout
from helix_megatron.observe import purpose

# NCCL on an H100's NVLink: up to about this size per rank an all-gather beats an all-to-all of two ranks that
# moves half as much (helix_megatron.plan.constants has the table), and one that moves as much at any number.
GATHERED_BYTES = 512 << 10


class StepAttention(ABC):
    """One rank's attention: `prepare` once in a step, then `attend` in every layer.

    Args:
        layout: how heads are cut.
        group: the m ranks of this head group, in order of their segments.
        book: the pages of all members.
        cache: this rank's pool.
    """

    def __init__(
        self, layout: HeadLayout, group: ProcessGroup, book: PageBook, cache: PagedCache
    ) -> None:
        self.layout, self.group, self.book, self.cache = layout, group, book, cache
        self.me = group.rank()
        self.device, self.dtype = cache.k.device, cache.k.dtype
        self.tokens = 0
        self.gathers_up_to = GATHERED_BYTES if dist.get_backend(group) == "nccl" else 0

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """The step's tokens, in this order; the book has their pages."""
        self.tokens = sum(len(piece.tokens) for piece in pieces)
        self._prepare(pieces)

    @abstractmethod
    def _prepare(self, pieces: Sequence[Piece]) -> None:
        """What all layers need alike."""

    @abstractmethod
    def attend(
        self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, *, scale: float, window: Window
    ) -> Tensor:
        """Keep the new keys and values, and attend.

        Args:
            layer: from 0.
            q: [T, *layout.rank_query_shape].
            k_TGC, v_TGC: [T, g/n, d/m].

        Returns:
            The output in the shape of q.
        """

    def _gathers(self, nbytes: int, ranks: int) -> bool:
        """Whether everybody may get all of it, which is faster for small messages of few ranks.

        Args:
            nbytes: that a rank would send, the same number on all of them.
            ranks: up to which it is faster.
        """
        return self.layout.segments <= ranks and 0 < nbytes <= self.gathers_up_to

    def _swap(self, sent_m: Tensor, purpose: str) -> Tensor:
        """[m, ...] → [m, ...]: what each member has for this one."""
        if self._gathers(sent_m.nbytes, 2):
            return gather(sent_m, self.group, purpose=purpose)[:, self.me]
        return swap(sent_m, self.group, purpose=purpose)

    def _index(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self.device)

    def _work(self, pieces: Sequence[Piece], member: int) -> PagedWork:
        """Attention of all queries of some pieces to the keys that a member keeps."""
        local, row = [], 0
        for piece in pieces:
            rows = (row, row + len(piece.tokens))
            row = rows[1]
            positions = self.book.positions(piece.sequence, member, piece.stop)
            if len(positions):
                pages = self.book.pages(piece.sequence, member)
                local.append(LocalPiece(rows, piece.start, pages, positions))
        return PagedWork(local, row, self.book.page_size, self.dtype, self.device)

    def _slots(self, pieces: Sequence[Piece], member: int) -> Tensor:
        """Slots of all tokens of pieces that a member keeps whole."""
        return self._index(
            _concatenated(
                self.book.slots(piece.sequence, member, np.arange(piece.start, piece.stop))
                for piece in pieces
            )
        )


class LocalAttention(StepAttention):
    """Nothing to exchange: a head group of one rank, or `segment-local` attention."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        self._slots_T = self._slots(pieces, 0)
        self._attention = self._work(pieces, 0)

    def attend(
        self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, *, scale: float, window: Window
    ) -> Tensor:
        self.cache.write(layer, self._slots_T, k_TGC, v_TGC)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        return self._attention.attend(q, keys, values, scale=scale, window=window)[0]


class BatchAttention(StepAttention):
    """Whole heads of some sequences: one all-to-all to their keeper, one back."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        m = self.layout.segments
        owners = np.concatenate([np.full(len(p.tokens), p.member) for p in pieces])
        order = np.argsort(owners, kind="stable")
        self._order = self._index(order)
        self._back = self._index(np.argsort(order))
        self._counts = np.bincount(owners, minlength=m).tolist()
        own = [piece for piece in pieces if piece.member == self.me]
        self._slots_t = self._slots(own, self.me)
        self._attention = self._work(own, self.me)

    def attend(
        self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, *, scale: float, window: Window
    ) -> Tensor:
        queries = q[0].numel()
        sent = torch.cat([q.flatten(1), k_TGC.flatten(1), v_TGC.flatten(1)], dim=1)[self._order]
        came = self._to_keepers(sent)
        q_mthd = came[..., :queries].unflatten(2, q.shape[1:])
        kv_mtGC = came[..., queries:].unflatten(2, (2 * k_TGC.size(1), -1))
        q_tHD, kv_tGD = whole_heads(q_mthd, kv_mtGC, self.layout)
        k_tGD, v_tGD = kv_tGD.chunk(2, dim=1)
        self.cache.write(layer, self._slots_t, k_tGD, v_tGD)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        o_tHD, _ = self._attention.attend(q_tHD, keys, values, scale=scale, window=window)
        came = self._from_keepers(parts_of_members(o_tHD, self.layout).flatten(2))
        return came[self._back].unflatten(1, q.shape[1:])

    def _to_keepers(self, sent_TW: Tensor) -> Tensor:
        """[T, W] in the order of the keepers → [m, T', W]: every member's part of the tokens kept here."""
        m, own = self.layout.segments, self._counts[self.me]
        if self._gathers(sent_TW.nbytes, 2):
            first = sum(self._counts[: self.me])
            every = gather(sent_TW, self.group, purpose="exchange/batch")
            return every[:, first : first + own]
        with purpose("exchange/batch"):
            came = _exchange(sent_TW, self._counts, [own] * m, self.group)
        return came.view(m, own, sent_TW.size(1))

    def _from_keepers(self, sent_mtX: Tensor) -> Tensor:
        """[m, T', X] → [T, X]: this member's part of all tokens, in the order of the keepers."""
        m, own = sent_mtX.shape[:2]
        most = max(self._counts)
        if self._gathers(m * most * sent_mtX.size(2) * sent_mtX.element_size(), 2):
            padded = F.pad(sent_mtX, (0, 0, 0, most - own))
            every = gather(padded, self.group, purpose="exchange/batch")[:, self.me]
            return torch.cat([part[:n] for part, n in zip(every, self._counts, strict=True)])
        with purpose("exchange/batch"):
            return _exchange(sent_mtX.flatten(0, 1), [own] * m, self._counts, self.group)


class SequenceAttention(StepAttention):
    """Whole heads of some positions: queries to everybody, partial outputs back, merged by log-sum-exp."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        owners, slots = [], []
        for piece in pieces:
            positions = np.arange(piece.start, piece.stop)
            owner = self.book.owners(piece.sequence, positions)
            owners.append(owner)
            slots.append(self.book.slots(piece.sequence, self.me, positions[owner == self.me]))
        owner = np.concatenate(owners)
        self._tokens_of = [
            self._index(np.flatnonzero(owner == t)) for t in range(self.layout.segments)
        ]
        self._slots_t = self._index(_concatenated(slots))
        self._attention = self._work(pieces, self.me)

    def attend(
        self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, *, scale: float, window: Window
    ) -> Tensor:
        m, tokens = self.layout.segments, q.size(0)
        q_mThd, kv_mtGC = self._spread(q, torch.cat([k_TGC, v_TGC], dim=1))
        q_THD, kv_tGD = whole_heads(q_mThd, kv_mtGC, self.layout)
        k_tGD, v_tGD = kv_tGD.chunk(2, dim=1)
        self.cache.write(layer, self._slots_t, k_tGD, v_tGD)
        keys, values = self.cache.k[layer], self.cache.v[layer]
        o_THD, lse_TH = self._attention.attend(q_THD, keys, values, scale=scale, window=window)

        o_mThd = parts_of_members(o_THD.to(lse_TH.dtype), self.layout)
        if self.layout.query_layout == "heads":
            lse_mTh = lse_TH.view(tokens, m, -1).transpose(0, 1)
        else:
            lse_mTh = lse_TH.expand(m, *lse_TH.shape)
        partial = torch.cat([o_mThd, lse_mTh.unsqueeze(-1)], dim=-1)
        partial = self._swap(partial, "exchange/sequence")
        return merge(partial[..., :-1], partial[..., -1]).to(q.dtype)

    def _spread(self, q: Tensor, kv_TGC: Tensor) -> tuple[Tensor, Tensor]:
        """Every member's queries [m, T, *q], and its keys and values [m, T', 2G, C] of positions kept here."""
        m, own = self.layout.segments, self._slots_t.numel()
        flat, width = q.numel(), kv_TGC[0].numel()
        if self._gathers(q.nbytes, m):
            sent = torch.cat([q.flatten(1), kv_TGC.flatten(1)], dim=1)
            every = gather(sent, self.group, purpose="exchange/sequence")
            kv = every[:, self._tokens_of[self.me], q[0].numel() :]
            return every[..., : q[0].numel()].unflatten(2, q.shape[1:]), kv.unflatten(
                2, kv_TGC.shape[1:]
            )
        parts = [p for mine in self._tokens_of for p in (q.reshape(-1), kv_TGC[mine].reshape(-1))]
        to = [flat + mine.numel() * width for mine in self._tokens_of]
        each = flat + own * width
        with purpose("exchange/sequence"):
            came = _exchange(torch.cat(parts), to, [each] * m, self.group).view(m, each)
        return came[:, :flat].unflatten(1, q.shape), came[:, flat:].unflatten(
            1, (own, *kv_TGC.shape[1:])
        )


class SegmentAttention(StepAttention):
    """Segments of everything: partial scores are summed over the group, then the softmax is local."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._slots_T = self._slots(pieces, 0)
        size = self.book.page_size
        self._keys: list[
            slice | Tensor
        ] = []  # a run of slots, read where it lies, or pages to copy
        for piece in pieces:
            pages = self.book.pages(piece.sequence, 0)[: -(-piece.stop // size)]
            if pages[-1] - pages[0] == len(pages) - 1 and (np.diff(pages) == 1).all():
                self._keys.append(slice(pages[0] * size, pages[0] * size + piece.stop))
            else:
                self._keys.append(self._index(np.asarray(pages)))

    def attend(
        self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, *, scale: float, window: Window
    ) -> Tensor:
        self.cache.write(layer, self._slots_T, k_TGC, v_TGC)
        wide = torch.promote_types(q.dtype, torch.float32)
        q_TGRC = (self._segments(q).to(wide) * scale).unflatten(1, (k_TGC.size(1), -1))
        partial, row = [], 0
        for piece, keys in zip(self._pieces, self._keys, strict=True):
            k_SGC = _read(self.cache.k[layer], keys, piece.stop).to(wide)
            q_LGRC = q_TGRC[row : row + len(piece.tokens)]
            partial.append(torch.einsum("lgrc,sgc->grls", q_LGRC, k_SGC))
            row += len(piece.tokens)
        summed = all_reduce(
            torch.cat([scores.reshape(-1) for scores in partial]),
            self.group,
            purpose="exchange/segment",
        )
        outputs, at = [], 0
        for piece, keys, own in zip(self._pieces, self._keys, partial, strict=True):
            scores = summed[at : at + own.numel()].view_as(own)
            at += own.numel()
            if len(piece.tokens) > 1 or window is not None:
                scores.masked_fill_(_hidden(piece, window, self.device), float("-inf"))
            v_SGC = _read(self.cache.v[layer], keys, piece.stop).to(wide)
            outputs.append(torch.einsum("grls,sgc->lgrc", scores.softmax(-1), v_SGC).flatten(1, 2))
        return self._own_heads(torch.cat(outputs).to(q.dtype))

    def _segments(self, q: Tensor) -> Tensor:
        """This rank's segments [T, H, C] of all queries of the group."""
        if self.layout.query_layout == "segments":
            return q
        m = self.layout.segments
        dims = np.concatenate([self.layout.segment_dims(j) for j in range(m)])
        q_mThC = q[..., self._index(dims)].unflatten(2, (m, -1)).permute(2, 0, 1, 3)
        q_mThC = self._swap(q_mThC, "exchange/segment")
        return q_mThC.transpose(0, 1).flatten(1, 2)

    def _own_heads(self, o_THC: Tensor) -> Tensor:
        """Where queries are dealt whole: this rank's heads [T, h/p, D] of segments of all."""
        if self.layout.query_layout == "segments":
            return o_THC
        o_mThC = o_THC.unflatten(1, (self.layout.segments, -1)).transpose(0, 1)
        o_mThC = self._swap(o_mThC, "exchange/segment")
        return join_canonical(o_mThC.unsqueeze(2), self.layout)[0].transpose(0, 1)


def whole_heads(q_mThd: Tensor, kv_mtGC: Tensor, layout: HeadLayout) -> tuple[Tensor, Tensor]:
    """Queries and keys (or values) of a group from what its members sent, in one order of dimensions.

    [m, T, *rank_query_shape] → [T, h/n, d], [m, T', G, d/m] → [T', G, d].
    """
    if layout.query_layout == "heads":
        q_THD = q_mThd.transpose(0, 1).flatten(1, 2)
        return q_THD, join_canonical(kv_mtGC.unsqueeze(2), layout)[0].transpose(0, 1)
    q_THD, kv_tGD = (join(part.unsqueeze(2))[0].transpose(0, 1) for part in (q_mThd, kv_mtGC))
    return q_THD, kv_tGD


def parts_of_members(o_THD: Tensor, layout: HeadLayout) -> Tensor:
    """[T, h/n, d] → [m, T, *rank_query_shape]: what each member asked for."""
    m = layout.segments
    if layout.query_layout == "heads":
        return o_THD.unflatten(1, (m, -1)).transpose(0, 1)
    return o_THD.unflatten(2, (m, -1)).permute(2, 0, 1, 3)


def _exchange(sent: Tensor, to: Sequence[int], of: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all of uneven parts of the first dimension: `to[t]` rows go to rank t, `of[t]` come from it."""
    came = sent.new_empty((sum(of), *sent.shape[1:]))
    dist.all_to_all_single(came, sent.contiguous(), list(of), list(to), group=group)
    return came


def _read(pool_PSGC: Tensor, keys: slice | Tensor, length: int) -> Tensor:
    """The first `length` keys or values [S, G, C] of a sequence, from a run of slots or from pages."""
    if isinstance(keys, slice):
        return pool_PSGC.flatten(0, 1)[keys]
    return pool_PSGC.index_select(0, keys).flatten(0, 1)[:length]


def _hidden(piece: Piece, window: Window, device: torch.device) -> Tensor:
    query = torch.arange(piece.start, piece.stop, device=device).unsqueeze(1)
    key = torch.arange(piece.stop, device=device)
    hidden = key > query
    if window is not None and window[0] >= 0:
        hidden |= key < query - window[0]
    return hidden


def _concatenated(arrays: Iterable[np.ndarray]) -> np.ndarray:
    parts = list(arrays)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


EXECUTORS: dict[str, type[StepAttention]] = {
    "batch": BatchAttention,
    "sequence": SequenceAttention,
    "segment": SegmentAttention,
}
