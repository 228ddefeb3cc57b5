"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, and holds back what might become one.

    The match that ends first wins, among those the longest: so the result does not depend on where the pieces
    are cut.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "callers refuse empty ones"
        self._strings = tuple(strings)
        self._held = ""
        self.hit = False

    def add(self, text: str) -> str:
        """The text that is certain now; after a hit, nothing."""
        if self.hit:
            return ""
        if not self._strings:
            return text
        text = self._held + text
        matches = [
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if matches:
            self.hit = True
            self._held = ""
            return text[: min(matches)[1]]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        longest = max(map(len, self._strings)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self._strings):
                return length
        return 0
