"""Which page of which member of a head group holds which positions of which sequence.

Keys and values lie in pages of `page_size` positions. The books are kept alike on every rank, from the same
orders in the same order, so that no page table ever travels.

Three placements of a sequence's positions over the m members of a group:

    one      all of them at one member (cache layout `batch`, or a group of one)
    dealt    block b at member (first + b) mod m (cache layout `sequence`)
    all      all of them at every member, each with its segment (cache layout `segment`): one book for all
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence.

    Args:
        sequence: its number.
        start: position of the first token; 0 begins the sequence.
        tokens: int64 [count], at least one.
        member: who keeps its first block; the same in every head group.
        expected: positions that the sequence may come to have.
        wanted: whether the logits after the last token are.
    """

    sequence: int
    start: int
    tokens: np.ndarray
    member: int
    expected: int
    wanted: bool

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


class PageAllocator:
    """The free pages of one pool. Gives neighbours where it can: a run of pages is read without a copy."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        self.free = pages
        self._is_free = bytearray(b"\1" * pages)
        self._cursor = 0

    def take(self, count: int, after: int | None, expected: int) -> list[int]:
        """`count` pages.

        Args:
            count: not more than are free.
            after: the last page that the sequence has already.
            expected: pages that a new sequence may come to need in all: it starts where they could all lie
                side by side.
        """
        assert count <= self.free, "the caller asks first"
        taken = []
        for _ in range(count):
            page = self._next(after, max(1, expected))
            self._is_free[page] = 0
            taken.append(page)
            after = page
        self.free -= count
        return taken

    def give(self, pages: list[int]) -> None:
        """Free pages that were taken."""
        for page in pages:
            assert not self._is_free[page], "a page is given back once"
            self._is_free[page] = 1
        self.free += len(pages)

    def _next(self, after: int | None, expected: int) -> int:
        if after is not None:
            if after + 1 < self.total and self._is_free[after + 1]:
                return after + 1
            return self._find(b"\1")
        run = b"\1" * expected
        start = self._is_free.find(run, self._cursor)
        if start < 0:
            start = self._is_free.find(run)
        if start < 0:
            return self._find(b"\1")
        self._cursor = (start + expected) % self.total
        return start

    def _find(self, run: bytes) -> int:
        start = self._is_free.find(run, self._cursor)
        return start if start >= 0 else self._is_free.find(run)


@dataclass
class _Sequence:
    first: int  # member of block 0
    expected: int  # positions that it may come to have
    length: int = 0
    pages: list[list[int]] = field(default_factory=list)  # of each member


class PageBook:
    """The pages of all sequences at all members of a head group.

    Args:
        members: pools with pages of their own: m for the placements `one` and `dealt`, 1 for `all`.
        pages: of each pool.
        page_size: positions of a page.
        dealt: whether a sequence's blocks go round the members.
    """

    def __init__(self, members: int, pages: int, page_size: int, *, dealt: bool) -> None:
        self.members, self.page_size, self.dealt = members, page_size, dealt
        self.pools = [PageAllocator(pages) for _ in range(members)]
        self._sequences: dict[int, _Sequence] = {}

    # ------------------------------------------------------------------- orders

    def add(self, sequence: int, first: int, expected: int) -> None:
        """Begin a sequence without positions, block 0 to be kept by member `first`."""
        assert sequence not in self._sequences, "numbers of sequences are used once at a time"
        pages: list[list[int]] = [[] for _ in range(self.members)]
        self._sequences[sequence] = _Sequence(first, expected, pages=pages)

    def grow(self, sequence: int, length: int) -> bool:
        """Give a sequence pages for `length` positions; False, and nothing changes, where they are not free."""
        entry = self._sequences[sequence]
        blocks = range(self._blocks(entry.length), self._blocks(length))
        if not blocks:
            entry.length = max(entry.length, length)
            return True
        needed = self._per_member(entry.first, blocks)
        if any(count > pool.free for count, pool in zip(needed, self.pools, strict=True)):
            return False
        expected = self._per_member(entry.first, range(self._blocks(entry.expected)))
        for member, count in enumerate(needed):
            own = entry.pages[member]
            after = own[-1] if own else None
            own += self.pools[member].take(count, after, expected[member])
        entry.length = max(entry.length, length)
        return True

    def drop(self, sequence: int) -> None:
        """End a sequence and free its pages."""
        entry = self._sequences.pop(sequence)
        for pool, pages in zip(self.pools, entry.pages, strict=True):
            pool.give(pages)

    # ------------------------------------------------------------------ queries

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def fits(self, length: int) -> bool:
        """Whether one sequence of that length fits into empty pools."""
        needed = self._per_member(0, range(self._blocks(length)))
        return all(count <= pool.total for count, pool in zip(needed, self.pools, strict=True))

    def has_room(self, first: int, length: int, promised: list[int]) -> bool:
        """Whether a new sequence of that length fits beside what is used and promised to others (`missing`)."""
        needed = self._per_member(first, range(self._blocks(length)))
        every = zip(needed, promised, self.pools, strict=True)
        return all(count + others <= pool.free for count, others, pool in every)

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        """Pages of each member that sequences lack for the lengths given: (sequence, length)."""
        total = [0] * self.members
        for sequence, length in lengths:
            entry = self._sequences[sequence]
            blocks = range(self._blocks(entry.length), self._blocks(length))
            for member, count in enumerate(self._per_member(entry.first, blocks)):
                total[member] += count
        return total

    def short(self, sequence: int, length: int) -> list[int]:
        """The members that have too few free pages for a sequence to grow to that length."""
        needed = self.missing([(sequence, length)])
        return [m for m, pool in enumerate(self.pools) if needed[m] > pool.free]

    def emptiest(self, promised: list[int]) -> int:
        """The member with most pages that are neither used nor promised: where a new sequence begins."""
        free = [pool.free - others for pool, others in zip(self.pools, promised, strict=True)]
        return free.index(max(free))

    def pages(self, sequence: int, member: int) -> list[int]:
        """Of a member, in the order of the positions."""
        return self._sequences[sequence].pages[member]

    def owners(self, sequence: int, positions: np.ndarray) -> np.ndarray:
        """The member that keeps each position."""
        return self._owner(self._sequences[sequence].first, positions // self.page_size)

    def slots(self, sequence: int, member: int, positions: np.ndarray) -> np.ndarray:
        """Where in its pool (page · page_size + offset) a member keeps positions that it owns."""
        blocks, offsets = np.divmod(positions, self.page_size)
        if self.dealt:
            blocks = blocks // self.members
        pages = np.asarray(self.pages(sequence, member), dtype=np.int64)
        return pages[blocks] * self.page_size + offsets

    def positions(self, sequence: int, member: int, length: int) -> np.ndarray:
        """Positions below `length` that a member keeps, ascending, as they lie in its pages."""
        entry = self._sequences[sequence]
        if not self.dealt:
            return np.arange(length if member == entry.first or self.members == 1 else 0)
        blocks = np.arange(
            (member - entry.first) % self.members, self._blocks(length), self.members
        )
        positions = (blocks[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)
        return positions[positions < length]

    @property
    def used(self) -> int:
        """Pages in use, of all pools."""
        return self.total - sum(pool.free for pool in self.pools)

    @property
    def used_by_kind(self) -> tuple[int, ...]:
        """`used` of each kind of layers that have books of their own, see `windows`; here there is one."""
        return (self.used,)

    @property
    def total(self) -> int:
        """Pages of all pools."""
        return sum(pool.total for pool in self.pools)

    def _blocks(self, length: int) -> int:
        return -(-length // self.page_size)

    def _owner(self, first: int, blocks: np.ndarray) -> np.ndarray:
        return (first + blocks) % self.members if self.dealt else np.full_like(blocks, first)

    def _per_member(self, first: int, blocks: range) -> list[int]:
        owners = self._owner(first, np.asarray(blocks, dtype=np.int64))
        return np.bincount(owners, minlength=self.members).tolist()
