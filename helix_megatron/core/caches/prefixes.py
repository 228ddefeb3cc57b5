"""Which kept page holds the keys and values of a block of tokens behind given other blocks.

Blocks form trees: each is known by the block before it and by its own tokens, so two sequences find the same
page exactly when all their tokens up to its end are the same. Tokens are compared, not only their hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

Key = tuple[int, bytes]


@dataclass(frozen=True)
class Block:
    """A full page of tokens. `number` is given once and never again; `page` is one of the member's pool."""

    number: int
    page: int


class PrefixIndex:
    """The blocks that are kept, of all members."""

    def __init__(self) -> None:
        self._blocks: dict[Key, Block] = {}
        self._keys: dict[tuple[int, int], Key] = {}  # of (member, page)
        self._count = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @staticmethod
    def root(first: int) -> int:
        """What stands for the block before the first one, of sequences that begin at member `first`."""
        return -1 - first

    def find(self, before: int, tokens: bytes) -> Block | None:
        """The block with these tokens behind the block with the number `before`."""
        return self._blocks.get((before, tokens))

    def add(self, before: int, tokens: bytes, member: int, page: int) -> Block:
        """Remember a block that `find` does not know."""
        assert (before, tokens) not in self._blocks, "the caller looks first"
        block = Block(self._count, page)
        self._count += 1
        self._blocks[before, tokens] = block
        self._keys[member, page] = before, tokens
        return block

    def forget(self, member: int, page: int) -> None:
        """Forget the block of a page. What follows it is not found any more, since its number is gone."""
        del self._blocks[self._keys.pop((member, page))]
