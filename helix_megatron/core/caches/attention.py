"""The attention of a step over the ranks of a head group: what the cache layouts share.

Letters of shapes: T tokens of the step, T' those whose keys and values this rank keeps; H, G query and
key-value heads, D dimensions, C = D/m of a segment; m ranks of the head group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from helix_megatron.core.layout import HeadLayout
from helix_megatron.hardware import GATHERED_BYTES

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from helix_megatron.core.caches.paged import PagedCache, PagedWork, Window
    from helix_megatron.core.caches.pages import PageTables, Piece


@dataclass(frozen=True, eq=False)
class Scores:
    """What a layer makes of the products of queries and keys before they weigh values.

    Args:
        scale: of the products.
        window: (left, right) as in `AttentionMask`.
        softcap: bounds scores smoothly, softcap · tanh(score / softcap); None does not.
        sinks_H: one more term exp(sink) in the softmax of each query head of the head group, [h/n], as of a key
            whose value is 0; None: there are none.
    """

    scale: float
    window: Window = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


class StepAttention(ABC):
    """One rank's attention: `prepare` once in a step, then `attend` in every layer.

    `prepare` makes every index and bias, also for the windows of layers that `windows` names, so that on a GPU
    a layer makes nothing on the host and waits for nothing.

    Args:
        layout: how heads are cut.
        group: the m ranks of this head group, in order of their segments.
        tables: the pages of all members.
        cache: this rank's pool.
    """

    def __init__(
        self, layout: HeadLayout, group: ProcessGroup, tables: PageTables, cache: PagedCache
    ) -> None:
        from helix_megatron.core.collectives import backend_of

        self.layout, self.group, self.tables, self.cache = layout, group, tables, cache
        self.me = group.rank()
        self.device, self.dtype = cache.device, cache.dtype
        self.tokens = 0
        self._attention: PagedWork
        self.windows: set[Window] = set()
        on_nccl = backend_of(group, self.device) == "nccl"
        self.gathers_up_to = GATHERED_BYTES if on_nccl else 0

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """The step's tokens, in this order; the tables have their pages."""
        self.tokens = sum(len(piece.tokens) for piece in pieces)
        self._prepare(pieces)

    @abstractmethod
    def _prepare(self, pieces: Sequence[Piece]) -> None:
        """What all layers need alike."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, scores: Scores) -> Tensor:
        """Keep the new keys and values, and attend.

        Args:
            layer: from 0.
            q: [T, *layout.rank_query_shape].
            k_TGC, v_TGC: this rank's segments, [T, g/n, d/m]; or, where every member has them whole anyway,
                [T, g/n, d], and then nothing of them is sent (`batch` and `sequence`, queries dealt whole).

        Returns:
            The output, [T, heads, dimensions of values] in the order of q.
        """

    def _here(self, layer: int, q_THD: Tensor, scores: Scores, *, sinks: bool = True) -> Any:
        """Attention of whole heads to the keys in this rank's pages: o [T, H, E] and lse [T, H].

        Args:
            sinks: whether this rank's part is the one that has them.
        """
        from helix_megatron.core.kernels.partial import with_sinks

        o, lse = self._attention.attend(
            q_THD,
            self.cache.k[layer],
            self.cache.v[layer],
            scale=scores.scale,
            window=scores.window,
            softcap=scores.softcap,
        )
        if scores.sinks_H is None or not sinks:
            return o, lse
        return with_sinks(o, lse, scores.sinks_H)

    def _is_whole(self, layer: int, k_TGD: Tensor) -> bool:
        """Whether new keys are whole heads, as they are kept."""
        return k_TGD.size(-1) == self.cache.k[layer].size(-1)

    def _gathers(self, nbytes: int, ranks: int) -> bool:
        """Whether everybody may get all of it, which is faster for small messages of few ranks.

        Args:
            nbytes: that a rank would send, the same number on all of them.
            ranks: up to which it is faster.
        """
        return self.layout.segments <= ranks and 0 < nbytes <= self.gathers_up_to

    def _swap(self, sent_m: Tensor, purpose: str) -> Tensor:
        """[m, ...] → [m, ...]: what each member has for this one."""
        from helix_megatron.core.collectives import gather, swap

        if self._gathers(sent_m.nbytes, 2):
            return gather(sent_m, self.group, purpose=purpose)[:, self.me]
        return swap(sent_m, self.group, purpose=purpose)

    def _index(self, values: np.ndarray) -> Tensor:
        from helix_megatron.core.device import on_device

        return on_device(np.asarray(values, dtype=np.int64), self.device)

    def _work(self, pieces: Sequence[Piece], member: int) -> PagedWork:
        """Attention of all queries of some pieces to the keys that a member keeps."""
        from helix_megatron.core.caches.paged import LocalPiece, PagedWork

        local, row = [], 0
        for piece in pieces:
            rows = (row, row + len(piece.tokens))
            row = rows[1]
            positions = self.tables.positions(piece.sequence, member, piece.stop)
            if len(positions):
                pages = self.tables.pages(piece.sequence, member)
                local.append(LocalPiece(rows, piece.start, pages, positions))
        return PagedWork(local, row, self.tables.page_size, self.dtype, self.device, self.windows)

    def _slots(self, pieces: Sequence[Piece], member: int) -> Tensor:
        """Slots of all tokens of pieces that a member keeps whole."""
        return self._index(
            concatenated(
                self.tables.slots(piece.sequence, member, np.arange(piece.start, piece.stop))
                for piece in pieces
            )
        )


class LocalAttention(StepAttention):
    """Nothing to exchange: a head group of one rank, or `segment-local` attention."""

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        self._slots_T = self._slots(pieces, 0)
        self._attention = self._work(pieces, 0)

    def attend(self, layer: int, q: Tensor, k_TGC: Tensor, v_TGC: Tensor, scores: Scores) -> Tensor:
        self.cache.write(layer, self._slots_T, k_TGC, v_TGC)
        return self._here(layer, q, scores)[0]


def whole_queries(q_mThd: Tensor, layout: HeadLayout) -> Tensor:
    """Queries of a group from what its members sent: [m, T, *rank_query_shape] → [T, h/n, d]."""
    from helix_megatron.core.exchanges.segments import join

    if layout.query_layout == "heads":
        return q_mThd.transpose(0, 1).flatten(1, 2)
    return join(q_mThd)


def whole_keys(kv_mtGC: Tensor, layout: HeadLayout) -> Tensor:
    """Keys (or values) of a group from its members' segments, in the order of dimensions that queries have.

    [m, T', G, d/m] → [T', G, d].
    """
    from helix_megatron.core.exchanges.segments import join, join_canonical

    return join_canonical(kv_mtGC, layout) if layout.query_layout == "heads" else join(kv_mtGC)


def parts_of_members(o_THD: Tensor, layout: HeadLayout) -> Tensor:
    """[T, h/n, d] → [m, T, *rank_query_shape]: what each member asked for."""
    m = layout.segments
    if layout.query_layout == "heads":
        return o_THD.unflatten(1, (m, -1)).transpose(0, 1)
    return o_THD.unflatten(2, (m, -1)).permute(2, 0, 1, 3)


def uneven_swap(sent: Tensor, to: Sequence[int], of: Sequence[int], group: ProcessGroup) -> Tensor:
    """All-to-all of uneven parts of the first dimension: `to[t]` rows go to rank t, `of[t]` come from it."""
    import torch.distributed as dist

    came = sent.new_empty((sum(of), *sent.shape[1:]))
    dist.all_to_all_single(came, sent.contiguous(), list(of), list(to), group=group)
    return came


def concatenated(arrays: Iterable[np.ndarray]) -> np.ndarray:
    parts = list(arrays)
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
