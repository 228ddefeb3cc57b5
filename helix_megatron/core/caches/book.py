"""Rank 0's book of pages: it allots them to sequences, and lets those that begin alike share them.

A block whose tokens are all computed is kept. A later sequence with the same tokens so far uses its page
instead of computing it, at the same time or after the first one has ended, until the page is needed elsewhere.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from helix_megatron.core.caches.allocator import PageAllocator
from helix_megatron.core.caches.pages import PageTables
from helix_megatron.core.caches.prefixes import Block, PrefixIndex

FREED = -1  # in the place of a page that a sequence had and does not need any more


@dataclass
class _Progress:
    expected: int  # positions that the sequence may come to have
    last: int  # number of the last block that is kept or was found kept
    length: int = 0  # positions that have pages
    kept: int = 0  # blocks up to that one
    fresh: bool = True  # all pages so far are shared ones
    told: int = 0  # blocks whose pages the ranks know


class PageBook(PageTables):
    """The pages of all sequences at all members of a head group, and those that are free or kept.

    Args:
        members: pools with pages of their own: m for the placements `one` and `dealt`, 1 for `all`.
        pages: of each pool.
        page_size: positions of a page.
        dealt: whether a sequence's blocks go round the members.
        shares: whether blocks are kept, and found again.
    """

    def __init__(
        self, members: int, pages: int, page_size: int, *, dealt: bool, shares: bool = True
    ) -> None:
        super().__init__(members, page_size, dealt=dealt)
        self.shares = shares
        self.prefixes = PrefixIndex()
        self.pools = [
            PageAllocator(pages, partial(self.prefixes.forget, member)) for member in range(members)
        ]
        self._progress: dict[int, _Progress] = {}

    # ------------------------------------------------------------------- orders

    def add(self, sequence: int, first: int, expected: int = 0) -> None:
        """Begin a sequence without pages that may come to have `expected` positions."""
        super().add(sequence, first)
        self._progress[sequence] = _Progress(expected, self.prefixes.root(first))

    def share(self, sequence: int, tokens: Sequence[int]) -> int:
        """Give a sequence the pages of blocks that are kept, as far as they go on where it is.

        Args:
            tokens: its tokens from position 0. The last one is left to be computed: its logits are wanted.

        Returns:
            The positions that the sequence has now.
        """
        progress, entry = self._progress[sequence], self._sequences[sequence]
        if progress.length != progress.kept * self.page_size:
            return progress.length  # inside a block, or behind one that is its own
        for block in self._known(entry.first, tokens, progress.kept, progress.last):
            owner = self.owner(entry.first, progress.kept)
            self.pools[owner].use([block.page])
            self.extend(sequence, [block.page])
            progress.last = block.number
            progress.kept += 1
            progress.length += self.page_size
        return progress.length

    def grow(self, sequence: int, length: int) -> bool:
        """Give a sequence pages for `length` positions; False, and nothing changes, where they are not free."""
        progress, entry = self._progress[sequence], self._sequences[sequence]
        blocks = range(entry.blocks, self._blocks(length))
        if blocks:
            needed = self._per_member(entry.first, blocks)
            if any(count > pool.available for count, pool in zip(needed, self.pools, strict=True)):
                return False
            rest = range(blocks.start, self._blocks(progress.expected) if progress.fresh else 0)
            expected = self._per_member(entry.first, rest)
            turns = []
            for pool, own, *counts in zip(self.pools, entry.pages, needed, expected, strict=True):
                after = own[-1] if own else None
                turns.append(iter(pool.take(counts[0], after, counts[1])))
            self.extend(sequence, [next(turns[self.owner(entry.first, block)]) for block in blocks])
            progress.fresh = False
        progress.length = max(progress.length, length)
        return True

    def keep(self, sequence: int, tokens: Sequence[int], length: int) -> None:
        """Keep the full blocks of a sequence.

        Args:
            tokens: its tokens from position 0.
            length: how many of them are computed before or in the step that is planned.
        """
        progress, entry = self._progress[sequence], self._sequences[sequence]
        if not self.shares:
            return
        for number in range(progress.kept, length // self.page_size):
            text = self._text(tokens, number)
            block = self.prefixes.find(progress.last, text)
            if block is None:
                owner = self.owner(entry.first, number)
                page = entry.pages[owner][number // self.members if self.dealt else number]
                self.pools[owner].keep(page)
                block = self.prefixes.add(progress.last, text, owner, page)
            # Where another sequence has computed the same, this one's page stays unknown.
            progress.last = block.number
            progress.kept += 1

    def drop(self, sequence: int) -> None:
        """End a sequence; its pages are free, or kept without a user."""
        entry = self._sequences[sequence]
        for pool, pages in zip(self.pools, entry.pages, strict=True):
            pool.give(reversed(pages))  # of a beginning, the end is given away first
        super().drop(sequence)
        del self._progress[sequence]

    def tell(self, sequence: int) -> list[int]:
        """The pages of the blocks that the sequence has got since the last call."""
        progress = self._progress[sequence]
        pages = self.blocks(sequence, progress.told)
        progress.told += len(pages)
        return pages

    # ------------------------------------------------------------------ queries

    def fits(self, length: int) -> bool:
        """Whether one sequence of that length fits into empty pools."""
        needed = self._at_once(0, length)
        return all(count <= pool.total for count, pool in zip(needed, self.pools, strict=True))

    def place(
        self,
        tokens: Sequence[int],
        promised: Sequence[int],
        *,
        shares: bool = True,
        among: Sequence[int] | None = None,
    ) -> int | None:
        """The member where a new sequence should begin; None where there is no room for all its tokens.

        It is the one that keeps most of the sequence's beginning, unless it has to attend to more pages than
        another one by more than the sequence has; of several the one with most room.

        Args:
            promised: pages of each member that others will take (`missing`).
            shares: whether `share` will be called for it.
            among: the members that it may begin at; all by default.
        """
        room = [pool.available - others for pool, others in zip(self.pools, promised, strict=True)]
        load = list(promised)  # pages to attend to, a shared one as often as it is used
        for entry in self._sequences.values():
            for member, pages in enumerate(entry.pages):
                load[member] += len(_held(pages))
        known = [
            list(self._known(first, tokens)) if shares else [] for first in range(self.members)
        ]

        def fits(first: int) -> bool:
            needed = self._at_once(first, len(tokens))
            for number, block in enumerate(known[first]):
                owner = self.owner(first, number)
                needed[owner] -= self.pools[owner].users(block.page) > 0
            return all(count <= free for count, free in zip(needed, room, strict=True))

        members = range(self.members) if among is None else among
        able = [first for first in members if fits(first)]
        if not able:
            return None
        most = min(load[first] for first in able) + self._blocks(len(tokens))
        near = [first for first in able if load[first] <= most]
        # Pages that are kept are room, too, but better left alone.
        free = [pool.free - others for pool, others in zip(self.pools, promised, strict=True)]
        return max(near, key=lambda first: (len(known[first]), free[first], room[first]))

    def missing(self, lengths: Iterable[tuple[int, int]]) -> list[int]:
        """Pages of each member that sequences lack for the lengths given: (sequence, length)."""
        total = [0] * self.members
        for sequence, length in lengths:
            entry = self._sequences[sequence]
            blocks = range(entry.blocks, self._blocks(length))
            for member, count in enumerate(self._per_member(entry.first, blocks)):
                total[member] += count
        return total

    def short(self, sequence: int, length: int) -> list[int]:
        """The members that have too few pages for a sequence to grow to that length."""
        needed = self.missing([(sequence, length)])
        return [m for m, pool in enumerate(self.pools) if needed[m] > pool.available]

    def would_free(self, sequence: int, members: Iterable[int]) -> bool:
        """Whether a member has pages that only this sequence uses."""
        return any(
            self.pools[member].users(page) == 1
            for member in members
            for page in _held(self.pages(sequence, member))
        )

    def holds(self, sequence: int, members: Iterable[int]) -> bool:
        """Whether a sequence has pages of one of the members."""
        return any(_held(self.pages(sequence, member)) for member in members)

    @property
    def used(self) -> int:
        """Pages in use, of all pools; one that is shared counts once."""
        return self.total - sum(pool.available for pool in self.pools)

    @property
    def used_by_kind(self) -> tuple[int, ...]:
        """`used` of each kind of layers that have books of their own, see `windows`; here there is one."""
        return (self.used,)

    @property
    def kept(self) -> int:
        """Pages, of all pools, that are kept and in use by no sequence."""
        return sum(pool.idle for pool in self.pools)

    @property
    def total(self) -> int:
        """Pages of all pools."""
        return sum(pool.total for pool in self.pools)

    # -------------------------------------------------------------------- parts

    def _known(
        self, first: int, tokens: Sequence[int], start: int = 0, last: int | None = None
    ) -> Iterable[Block]:
        """The kept blocks of a sequence from block `start` on, which comes behind the block numbered `last`."""
        number = self.prefixes.root(first) if last is None else last
        for index in range(start, (len(tokens) - 1) // self.page_size):
            block = self.prefixes.find(number, self._text(tokens, index))
            if block is None:
                return
            yield block
            number = block.number

    def _text(self, tokens: Sequence[int], block: int) -> bytes:
        at = block * self.page_size
        return array("q", tokens[at : at + self.page_size]).tobytes()

    def _at_once(self, first: int, length: int) -> list[int]:
        """The most pages of each member that a sequence of some length has at one time."""
        return self._per_member(first, range(self._blocks(length)))

    def _per_member(self, first: int, blocks: range) -> list[int]:
        if not self.dealt:
            return [len(blocks) if member == first else 0 for member in range(self.members)]
        begins = [
            blocks.start + (member - first - blocks.start) % self.members
            for member in range(self.members)
        ]
        return [len(range(begin, blocks.stop, self.members)) for begin in begins]


def _held(pages: Sequence[int]) -> list[int]:
    return [page for page in pages if page != FREED]
