"""Text of tokens that come one after another."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence

BYTES = 256
UNKNOWN = (
    "\N{REPLACEMENT CHARACTER}"  # what decoders make of bytes that are no character, or not yet
)


class TokenStream:
    """Text of tokens that come one after another, for any tokenizer that can decode a list of them.

    What a token adds is the difference between the text of the last few tokens with it and without it, because
    the text of one alone can differ: a space in front gets lost, a character has bytes in several tokens. So
    decoding starts at the last place where the text was whole. A character may still be unfinished where the
    text ends in replacement characters, and these wait.

    Tokens are looked at one by one, so the text does not depend on how they come in parts.

    Args:
        after: the tokens in front, whose text is not given; they tell whether a space belongs to what follows.
        hidden: the tokens that add no text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        after: Sequence[int] = (),
        hidden: Collection[int] = (),
    ) -> None:
        self._decode, self._hidden = decode, hidden
        self._before = [token for token in after if token not in hidden]  # their text is known
        self._new: list[int] = []
        self._start = decode(self._before) if self._before else ""
        self._given = 0  # characters of what `_new` adds to `_start`

    def add(self, tokens: Sequence[int]) -> str:
        return "".join(self._add(token) for token in tokens if token not in self._hidden)

    def finish(self) -> str:
        rest = self._added()[self._given :] if self._new else ""
        self._given += len(rest)
        return rest

    def _add(self, token: int) -> str:
        self._new.append(token)
        added = self._added()
        certain = added.rstrip(UNKNOWN)
        fresh = certain[self._given :]
        self._given += len(fresh)
        if fresh and certain == added:
            self._before, self._new, self._given = self._new, [], 0
            self._start = self._decode(self._before)
        return fresh

    def _added(self) -> str:
        return self._decode(self._before + self._new)[len(self._start) :]


class ByteStream:
    """Text of tokens that are bytes and come one after another; others add nothing."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, tokens: Sequence[int]) -> str:
        return self._decoder.decode(bytes(token for token in tokens if 0 <= token < BYTES))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class NumberStream:
    """The numbers of tokens, those that are hidden left out."""

    def __init__(self, hidden: Collection[int]) -> None:
        self._hidden = hidden

    def add(self, tokens: Sequence[int]) -> str:
        return "".join(f" {token}" for token in tokens if token not in self._hidden)

    def finish(self) -> str:
        return ""
