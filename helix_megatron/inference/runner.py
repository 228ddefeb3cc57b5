"""One rank's share of a step, whosever code computes the model, and how its pages are kept."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.caches import SEGMENTS, cache_layout
from helix_megatron.core.caches.attention import StepAttention
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.paged import KeptHeads, PagedCache, Window
from helix_megatron.core.caches.pages import PageTables, Piece
from helix_megatron.core.caches.windows import BookPair, Reach, WindowBook
from helix_megatron.core.layout import HeadLayout
from helix_megatron.inference.step import StepPlan, plan_group


class Runner(ABC):
    """A model with a paged cache on this rank, whosever code the model is.

    Subclasses make the pages that the model needs, and compute its logits.

    Attributes:
        group: the ranks that hold the model together.
        layout: how heads of the cache lie on them.
        tables: which pages sequences have at all members, for each kind of layers, see `KeptHeads.kind`.
        cache: this rank's pages.
        attentions: of each kind of layers.
    """

    group: ProcessGroup
    layout: HeadLayout
    device: torch.device
    dtype: torch.dtype
    tables: list[PageTables]
    cache: PagedCache
    attentions: list[StepAttention]

    @property
    def members(self) -> int:
        """How many members of the head group have pages of their own."""
        return self.tables[0].members

    @functools.cached_property
    def plans(self) -> ProcessGroup:
        """The group over which rank 0 tells the others its plans. Collective when it is first asked for."""
        return plan_group(self.group, self.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """Compute a step.

        Returns:
            On rank 0 of the tensor parallel group the logits of the tokens whose are wanted, piece by piece,
            [wanted, vocab_size] in at least fp32; None on other ranks, and where no piece wants any.
        """
        self._keep_tables(plan)
        if not plan.pieces:
            return None
        tokens = np.concatenate([piece.tokens for piece in plan.pieces])
        positions = np.concatenate([np.arange(p.start, p.stop) for p in plan.pieces])
        ends = np.cumsum([len(piece.tokens) for piece in plan.pieces])
        wanted = [np.arange(end - p.wanted, end) for end, p in zip(ends, plan.pieces, strict=True)]
        self._prepare(plan.pieces)
        return self._compute(tokens, positions, np.concatenate(wanted))

    @abstractmethod
    def _compute(
        self, tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Tensor | None:
        """Logits as `run` returns them.

        Args:
            tokens, positions: of the step, int64 [T].
            wanted: the rows among them whose logits are wanted.
        """

    def _prepare(self, pieces: Sequence[Piece]) -> None:
        """What all layers need alike for a step of these pieces."""
        for attention in self.attentions:
            attention.prepare(pieces)

    def _drop(self, sequence: int) -> None:  # noqa: B027 - most models have nothing beside pages
        """Forget what is kept of a sequence beside its pages."""

    def _keep_tables(self, plan: StepPlan) -> None:
        for sequence in plan.drops:
            if sequence in self.tables[0]:  # it may have come and gone between two steps
                for tables in self.tables:
                    tables.drop(sequence)
                self._drop(sequence)
        for piece in plan.pieces:
            new = len(piece.pages) // len(self.tables)
            for kind, tables in enumerate(self.tables):
                if piece.sequence not in tables:
                    tables.add(piece.sequence, piece.member)
                tables.extend(piece.sequence, piece.pages[kind * new : (kind + 1) * new])


def rank_layout(layout: HeadLayout, ranks: int) -> HeadLayout:
    """The same for stock attention, too, whose ranks are head groups of one rank."""
    return dataclasses.replace(layout, head_groups=ranks // layout.segments)


def is_local(layout: HeadLayout, attention: str) -> bool:
    """Whether each rank attends by itself, so that all cache layouts are one."""
    return layout.segments == 1 or attention == "segment-local"


def kept_dims(layout: HeadLayout, cache: str, local: bool) -> int:
    """Dimensions of a key or value as a rank keeps it: of a whole head, or of a segment."""
    return layout.segment_dim if local or cache == SEGMENTS else layout.head_dim


def kept_heads(
    layout: HeadLayout, cache: str, local: bool, pools: Pools, windows: Sequence[Window]
) -> list[KeptHeads]:
    """What a rank keeps of each layer of a model whose layers have the same heads, and these windows."""
    dims = kept_dims(layout, cache, local)
    shape = (layout.group_kv_heads, dims, dims)
    return [KeptHeads(pages, *shape, kind=kind) for pages, kind in map(pools.of, windows)]


@dataclass(frozen=True)
class Pools:
    """How many pages a rank has for each kind of layers.

    Args:
        every: for layers that see everything; 0 where there are none.
        windowed: for layers with windows whose pages are freed; 0 where there are none.
        reach: how far those see.
    """

    every: int
    windowed: int = 0
    reach: Reach | None = None

    @property
    def kinds(self) -> int:
        """Kinds of layers that have pages of their own."""
        return (self.every > 0) + (self.windowed > 0)

    @property
    def text(self) -> str:
        """For people."""
        windowed = f"{self.windowed:,} pages of layers with windows" if self.windowed else ""
        every = f"{self.every:,} pages" if self.every else ""
        return " and ".join(filter(None, (every, windowed)))

    def of(self, window: Window) -> tuple[int, int]:
        """(pages, kind) of a layer with that window, see `KeptHeads`."""
        if self.reach is None or window is None or not 0 <= window[0] <= self.reach.back:
            return self.every, 0
        return self.windowed, int(self.every > 0)


def make_book(
    cache: str, members: int, pages: int | Pools, page_size: int, *, shares: bool = True
) -> PageBook | BookPair:
    """Rank 0's books for a cache layout over `members` ranks of a head group.

    shares: whether sequences that begin alike share pages, where layers keep all that they need for it.
    """
    count, dealt = _placement(cache, members)
    pools = pages if isinstance(pages, Pools) else Pools(pages)
    shares = shares and pools.reach is None
    every = PageBook(count, pools.every, page_size, dealt=dealt, shares=shares)
    if pools.reach is None:
        return every
    windowed = WindowBook(count, pools.windowed, page_size, dealt=dealt, reach=pools.reach)
    return BookPair(every, windowed) if pools.every else windowed


def make_tables(cache: str, members: int, kinds: int, page_size: int) -> list[PageTables]:
    """A rank's tables for a cache layout over `members` ranks of a head group, for each kind of layers."""
    count, dealt = _placement(cache, members)
    return [PageTables(count, page_size, dealt=dealt) for _ in range(kinds)]


def _placement(cache: str, members: int) -> tuple[int, bool]:
    """How many members have pages of their own, and whether a sequence's blocks go round them."""
    placement = cache_layout(cache).placement
    return 1 if placement == "all" else members, placement == "dealt"
