"""Which page of which member of a head group holds which positions of which sequence.

Keys and values lie in pages of `page_size` positions. Rank 0 allots them (`book`) and tells the others which
pages a sequence gets, so that every rank's tables are alike. Sequences that begin alike may have pages in
common.

Three placements of a sequence's positions over the m members of a group:

    one      all of them at one member (cache layout `batch`, or a group of one)
    dealt    block b at member (first + b) mod m (cache layout `sequence`)
    all      all of them at every member, each with its segment (cache layout `segment`): one table for all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one sequence.

    Args:
        sequence: its number.
        start: position of the first token. What lies before it has been computed, for this sequence or for
            another one that begins alike.
        tokens: int64 [count], at least one.
        member: who keeps its first block; the same in every head group.
        pages: of the blocks that the sequence did not have before, in the order of its blocks; of each kind of
            layers, where there are two (`windows.BookPair`).
        wanted: of how many tokens, at the end of the piece, the logits are.
    """

    sequence: int
    start: int
    tokens: np.ndarray
    member: int
    pages: Sequence[int] = ()
    wanted: int = 0

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)


@dataclass
class _Sequence:
    first: int  # member of block 0
    blocks: int  # that have pages
    pages: list[list[int]]  # of each member


class PageTables:
    """The pages of all sequences at all members of a head group.

    Args:
        members: pools with pages of their own: m for the placements `one` and `dealt`, 1 for `all`.
        page_size: positions of a page.
        dealt: whether a sequence's blocks go round the members.
    """

    def __init__(self, members: int, page_size: int, *, dealt: bool) -> None:
        self.members, self.page_size, self.dealt = members, page_size, dealt
        self._sequences: dict[int, _Sequence] = {}

    def add(self, sequence: int, first: int) -> None:
        """Begin a sequence without pages, block 0 to be kept by member `first`."""
        assert sequence not in self._sequences, "numbers of sequences are used once at a time"
        self._sequences[sequence] = _Sequence(first, 0, [[] for _ in range(self.members)])

    def extend(self, sequence: int, pages: Sequence[int]) -> None:
        """Append the pages of a sequence's next blocks."""
        entry = self._sequences[sequence]
        for page in pages:
            entry.pages[self.owner(entry.first, entry.blocks)].append(int(page))
            entry.blocks += 1

    def drop(self, sequence: int) -> None:
        """End a sequence."""
        del self._sequences[sequence]

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def owner(self, first: int, block: int) -> int:
        """The member that keeps a block of a sequence whose block 0 is at member `first`."""
        return (first + block) % self.members if self.dealt else first

    def pages(self, sequence: int, member: int) -> list[int]:
        """Of a member, in the order of the positions."""
        return self._sequences[sequence].pages[member]

    def blocks(self, sequence: int, start: int = 0) -> list[int]:
        """The pages of a sequence's blocks from block `start` on, in the order of the blocks."""
        entry = self._sequences[sequence]
        step = self.members if self.dealt else 1
        return [
            entry.pages[self.owner(entry.first, block)][block // step]
            for block in range(start, entry.blocks)
        ]

    def owners(self, sequence: int, positions: np.ndarray) -> np.ndarray:
        """The member that keeps each position."""
        first, blocks = self._sequences[sequence].first, positions // self.page_size
        return (first + blocks) % self.members if self.dealt else np.full_like(blocks, first)

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

    def _blocks(self, length: int) -> int:
        return -(-length // self.page_size)
