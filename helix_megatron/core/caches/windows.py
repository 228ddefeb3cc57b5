"""The pages of layers whose queries see only so far back: those behind the window are free again.

A model whose layers alternate has two kinds of pages, each with pools of its own: of layers that see
everything, and of layers with windows. `BookPair` keeps the books of both, and is asked as if it were one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from helix_megatron.core.caches.book import FREED, PageBook


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

    Nothing of it is shared: who begins behind a beginning would need the pages of its last window.

    Args:
        reach: of the layers; the widest of their windows.
        others: see `PageBook`.
    """

    def __init__(
        self, members: int, pages: int, page_size: int, *, dealt: bool, reach: Reach
    ) -> None:
        super().__init__(members, pages, page_size, dealt=dealt, shares=False)
        self.reach = reach
        self._freed: dict[int, int] = {}  # blocks of each sequence

    def grow(self, sequence: int, length: int) -> bool:
        """As of any book. What the first new position does not see any more is free before."""
        self.forget(sequence)
        return super().grow(sequence, length)

    def forget(self, sequence: int) -> None:
        """Free the pages that lie wholly before the window of the next position."""
        entry, freed = self._sequences[sequence], self._freed.get(sequence, 0)
        seen = max(0, self._progress[sequence].length - self.reach.back)
        for block in range(freed, seen // self.page_size):
            member = self.owner(entry.first, block)
            place = block // self.members if self.dealt else block
            self.pools[member].give([entry.pages[member][place]])
            entry.pages[member][place] = FREED
        self._freed[sequence] = max(freed, seen // self.page_size)

    def drop(self, sequence: int) -> None:
        for own in self._sequences[sequence].pages:
            own[:] = [page for page in own if page != FREED]
        self._freed.pop(sequence, None)
        super().drop(sequence)

    def has_room(self, first: int, length: int, promised: Sequence[int]) -> bool:
        """Whether a new sequence of some length fits that begins at a member, beside the pages of others."""
        every = zip(self._at_once(first, length), promised, self.pools, strict=True)
        return all(count + others <= pool.available for count, others, pool in every)

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        total = [0] * self.members
        for sequence, length in lengths:
            entry = self._sequences[sequence]
            if self._blocks(length) <= entry.blocks:
                continue
            for member, count in enumerate(self._at_once(entry.first, length)):
                held = sum(page != FREED for page in entry.pages[member])
                total[member] += max(0, count - held)
        return total

    def short(self, sequence: int, length: int) -> list[int]:
        needed = super().missing([(sequence, length)])
        return [m for m, pool in enumerate(self.pools) if needed[m] > pool.available]

    def _at_once(self, first: int, length: int) -> list[int]:
        most = self.reach.blocks(self.page_size)
        if self.dealt:
            most = -(-most // self.members)
        return [min(count, most) for count in super()._at_once(first, length)]


class BookPair:
    """The books of both kinds of layers; numbers of members are those of the one, then those of the other.

    Args:
        every: the book of layers that see everything; it must not share.
        windowed: of layers with windows; as many members.
    """

    def __init__(self, every: PageBook, windowed: WindowBook) -> None:
        assert not every.shares, "windowed layers would lack what others have computed"
        self.books: tuple[PageBook, WindowBook] = (every, windowed)
        self.members, self.page_size, self.dealt = every.members, every.page_size, every.dealt

    def add(self, sequence: int, first: int, expected: int = 0) -> None:
        """See `PageBook`, here and below."""
        for book in self.books:
            book.add(sequence, first, expected)

    def share(self, sequence: int, tokens: Sequence[int]) -> int:
        return self.books[0].share(sequence, tokens)

    def keep(self, sequence: int, tokens: Sequence[int], length: int) -> None:
        pass

    def grow(self, sequence: int, length: int) -> bool:
        every, windowed = self.books
        windowed.forget(sequence)
        if self.short(sequence, length):
            return False
        return every.grow(sequence, length) and windowed.grow(sequence, length)

    def drop(self, sequence: int) -> None:
        for book in self.books:
            book.drop(sequence)

    def tell(self, sequence: int) -> list[int]:
        return [page for book in self.books for page in book.tell(sequence)]

    def __contains__(self, sequence: int) -> bool:
        return sequence in self.books[0]

    def __len__(self) -> int:
        return len(self.books[0])

    def fits(self, length: int) -> bool:
        return all(book.fits(length) for book in self.books)

    def place(
        self, tokens: Sequence[int], promised: Sequence[int], *, shares: bool = True
    ) -> int | None:
        every, windowed = self.books
        first, second = promised[: self.members], promised[self.members :]
        able = [at for at in range(self.members) if windowed.has_room(at, len(tokens), second)]
        return every.place(tokens, first, shares=shares, among=able)

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        lengths = list(lengths)
        return [count for book in self.books for count in book.missing(lengths)]

    def short(self, sequence: int, length: int) -> list[int]:
        return [
            member + place * self.members
            for place, book in enumerate(self.books)
            for member in book.short(sequence, length)
        ]

    def would_free(self, sequence: int, members: Iterable[int]) -> bool:
        return any(book.would_free(sequence, own) for book, own in self._of_books(members))

    def holds(self, sequence: int, members: Iterable[int]) -> bool:
        return any(book.holds(sequence, own) for book, own in self._of_books(members))

    @property
    def used(self) -> int:
        return sum(book.used for book in self.books)

    @property
    def kept(self) -> int:
        return 0

    @property
    def total(self) -> int:
        return sum(book.total for book in self.books)

    @property
    def used_by_kind(self) -> tuple[int, ...]:
        """Pages in use of each kind of layers, of all pools."""
        return tuple(book.used for book in self.books)

    def _of_books(self, members: Iterable[int]) -> Iterator[tuple[PageBook, list[int]]]:
        """Each book with those of the members that are its own."""
        places = [divmod(member, self.members) for member in members]
        for number, book in enumerate(self.books):
            yield book, [member for place, member in places if place == number]
