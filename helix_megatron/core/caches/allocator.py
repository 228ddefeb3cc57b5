"""The pages of one pool: which are free, which are in use and how often, and which are kept for a later use."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class PageAllocator:
    """Gives pages, neighbours where it can: a run of pages is read without a copy.

    A page may have several users. One that is kept (`keep`) stays as it is when its last user leaves; it is
    given away when no other page is left, the least recently used first.

    Args:
        pages: how many there are.
        forget: what is called with a kept page that is given away.
    """

    def __init__(self, pages: int, forget: Callable[[int], None] = lambda page: None) -> None:
        self.total = pages
        self.free = pages
        self._forget = forget
        self._is_free = bytearray(b"\1" * pages)
        self._users = [0] * pages
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept pages without users, oldest first
        self._cursor = 0

    @property
    def idle(self) -> int:
        """How many pages are kept and have no user."""
        return len(self._idle)

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return self.free + self.idle

    def users(self, page: int) -> int:
        """How many sequences use a page."""
        return self._users[page]

    def take(self, count: int, after: int | None, expected: int) -> list[int]:
        """Pages for one user, which must write to them before it reads.

        Args:
            count: not more than are available.
            after: the last page that the user has already.
            expected: pages that it may come to need, this one included: where the page behind `after` is not
                free, it goes on where they could all lie side by side.
        """
        assert count <= self.available, "the caller asks first"
        while self.free < count:
            page, _ = self._idle.popitem(last=False)
            self._kept.discard(page)
            self._forget(page)
            self._is_free[page] = 1
            self.free += 1
        taken = []
        for _ in range(count):
            page = self._next(after, max(1, expected))
            expected = 1
            self._is_free[page] = 0
            self._users[page] = 1
            taken.append(page)
            after = page
        self.free -= count
        return taken

    def use(self, pages: Iterable[int]) -> None:
        """Add a user to pages that are kept."""
        for page in pages:
            assert page in self._kept, "only what is kept can be shared"
            self._idle.pop(page, None)
            self._users[page] += 1

    def keep(self, page: int) -> None:
        """Keep a page that is in use for others who can use what is written there."""
        assert self._users[page], "a page is kept by who has written it"
        self._kept.add(page)

    def give(self, pages: Iterable[int]) -> None:
        """Take a user away from each page, in the order in which they are to be given to others."""
        for page in pages:
            assert self._users[page], "a page is given back once by each user"
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._kept:
                self._idle[page] = None
            else:
                self._is_free[page] = 1
                self.free += 1

    def _next(self, after: int | None, expected: int) -> int:
        if after is not None and after + 1 < self.total and self._is_free[after + 1]:
            return after + 1
        start = self._find(b"\1" * expected)
        if start < 0:
            return self._find(b"\1")
        if expected > 1:
            self._cursor = (start + expected) % self.total
        return start

    def _find(self, run: bytes) -> int:
        start = self._is_free.find(run, self._cursor)
        return start if start >= 0 else self._is_free.find(run)
