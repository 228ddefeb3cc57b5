"""The pages of layers whose queries see only so far back: those behind the window are free again.

A model whose layers alternate has two kinds of pages, each with pools of its own: of layers that see
everything, and of layers with windows. `BookPair` keeps the books of both, and is asked as if it were one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from helix_megatron.core.caches.pages import PageBook

FREED = -1  # in the place of a page that a sequence had


@dataclass(frozen=True)
class Reach:
    """How much of a sequence layers with windows need.

    Args:
        back: the most positions that a query sees before itself.
        chunk: the most new positions of a sequence in one step.
    """

    back: int
    chunk: int

    def blocks(self, page_size: int) -> int:
        """The most pages that a sequence has at one time."""
        return -(-(self.back + self.chunk) // page_size) + 1


class WindowBook(PageBook):
    """A book whose sequences give back what no later query sees.

    Args:
        reach: of the layers; the widest of their windows.
        others: see `PageBook`.
    """

    def __init__(
        self, members: int, pages: int, page_size: int, *, dealt: bool, reach: Reach
    ) -> None:
        super().__init__(members, pages, page_size, dealt=dealt)
        self.reach = reach
        self._freed: dict[int, int] = {}  # blocks of each sequence

    def grow(self, sequence: int, length: int) -> bool:
        """As of any book. What the first new position does not see any more is free before."""
        self.forget(sequence)
        return super().grow(sequence, length)

    def forget(self, sequence: int) -> None:
        """Free the pages that lie wholly before the window of the next position."""
        entry, freed = self._sequences[sequence], self._freed.get(sequence, 0)
        gone = np.arange(freed, max(0, entry.length - self.reach.back) // self.page_size)
        for block, member in zip(gone, self._owner(entry.first, gone), strict=True):
            own = entry.pages[member]
            place = block // self.members if self.dealt else block
            self.pools[member].give([own[place]])
            own[place] = FREED
        self._freed[sequence] = freed + len(gone)

    def drop(self, sequence: int) -> None:
        for own in self._sequences[sequence].pages:
            own[:] = [page for page in own if page != FREED]
        self._freed.pop(sequence, None)
        super().drop(sequence)

    def fits(self, length: int) -> bool:
        needed = self._at_once(0, length)
        return all(count <= pool.total for count, pool in zip(needed, self.pools, strict=True))

    def has_room(self, first: int, length: int, promised: list[int]) -> bool:
        every = zip(self._at_once(first, length), promised, self.pools, strict=True)
        return all(count + others <= pool.free for count, others, pool in every)

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        total = [0] * self.members
        for sequence, length in lengths:
            entry = self._sequences[sequence]
            if self._blocks(length) <= self._blocks(entry.length):
                continue
            for member, count in enumerate(self._at_once(entry.first, length)):
                held = sum(page != FREED for page in entry.pages[member])
                total[member] += max(0, count - held)
        return total

    def short(self, sequence: int, length: int) -> list[int]:
        needed = super().missing([(sequence, length)])
        return [m for m, pool in enumerate(self.pools) if needed[m] > pool.free]

    def _at_once(self, first: int, length: int) -> list[int]:
        """The most pages of each member that a sequence of some length has at one time."""
        whole = self._per_member(first, range(self._blocks(length)))
        most = self.reach.blocks(self.page_size)
        if self.dealt:
            most = -(-most // self.members)
        return [min(count, most) for count in whole]


class BookPair:
    """The books of both kinds of layers; numbers of pages are those of the one, then those of the other.

    Args:
        every: the book of layers that see everything.
        windowed: of layers with windows; as many members.
    """

    def __init__(self, every: PageBook, windowed: WindowBook) -> None:
        self.books: tuple[PageBook, WindowBook] = (every, windowed)
        self.members, self.page_size, self.dealt = every.members, every.page_size, every.dealt

    def add(self, sequence: int, first: int, expected: int) -> None:
        """See `PageBook`, here and below."""
        for book in self.books:
            book.add(sequence, first, expected)

    def grow(self, sequence: int, length: int) -> bool:
        every, windowed = self.books
        windowed.forget(sequence)
        if self.short(sequence, length):
            return False
        return every.grow(sequence, length) and windowed.grow(sequence, length)

    def drop(self, sequence: int) -> None:
        for book in self.books:
            book.drop(sequence)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self.books[0]

    def __len__(self) -> int:
        return len(self.books[0])

    def fits(self, length: int) -> bool:
        return all(book.fits(length) for book in self.books)

    def has_room(self, first: int, length: int, promised: Sequence[int]) -> bool:
        parts = (list(promised[: self.members]), list(promised[self.members :]))
        return all(
            book.has_room(first, length, part) for book, part in zip(self.books, parts, strict=True)
        )

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        lengths = list(lengths)
        return [count for book in self.books for count in book.missing(lengths)]

    def short(self, sequence: int, length: int) -> list[int]:
        return [
            member + place * self.members
            for place, book in enumerate(self.books)
            for member in book.short(sequence, length)
        ]

    def emptiest(self, promised: Sequence[int]) -> int:
        return self.books[0].emptiest(list(promised[: self.members]))

    def pages(self, sequence: int, member: int) -> list[int]:
        place, member = divmod(member, self.members)
        return self.books[place].pages(sequence, member)

    @property
    def used(self) -> int:
        return sum(book.used for book in self.books)

    @property
    def total(self) -> int:
        return sum(book.total for book in self.books)

    @property
    def used_by_kind(self) -> tuple[int, ...]:
        """Pages in use of each kind of layers, of all pools."""
        return tuple(book.used for book in self.books)
