"""The one exception that a user's mistake raises.

An error carries what is wrong, the setting and its value, the valid values, and what to try. Settings are named
as `Setting`s, since the same one is a flag on a command line, a keyword in Python and a key of a file: whoever
shows the error words them (`HelixError.worded`). `str(error)` speaks Python.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """A setting in a text, with the value that it should be given where the text recommends one."""

    name: str
    value: object = None


LONGEST_TEXT = 4000  # characters: a value of a damaged file may have any number of them

Words = Callable[[Setting], str]
Text = str | Iterable[str | Setting]


def with_settings(text: str) -> tuple[str | Setting, ...]:
    """A text in whose pieces `<name>` is the setting of that name."""
    parts = re.split(r"<(\w+)>", text)
    return tuple(Setting(part) if place % 2 else part for place, part in enumerate(parts))


def as_keyword(setting: Setting) -> str:
    """Word a setting as a keyword of a Python call: `exchange="auto"`."""
    if setting.value is None:
        return setting.name
    value = f'"{setting.value}"' if isinstance(setting.value, str) else setting.value
    return f"{setting.name}={value}"


class HelixError(ValueError):
    """Something that the user can put right: a setting, a file, a layout that cannot be.

    Args:
        problem: what is wrong, as one or more sentences; in pieces where it names settings.
        setting: name of the setting that is wrong, if it is one; `value` is what it was given.
        valid: what it may be, where that can be listed; `valid_name` is what the list calls these values, such
            as `numbers of groups`.
        remedy: what to try, in pieces: texts, and the settings between them.
    """

    status = 2  # with which a program that fails for it exits

    def __init__(
        self,
        problem: Text,
        *,
        setting: str = "",
        value: object = None,
        valid: Iterable[object] | None = None,
        valid_name: str = "",
        remedy: Iterable[str | Setting] = (),
    ) -> None:
        self._pieces = (problem,) if isinstance(problem, str) else tuple(problem)
        super().__init__(self.problem)
        self.setting, self.value = setting, value
        self.valid = None if valid is None else tuple(valid)
        self.valid_name, self.remedy = valid_name, tuple(remedy)

    @property
    def problem(self) -> str:
        """What is wrong, in Python's words."""
        return _text(self._pieces, as_keyword)

    def worded(self, words: Words) -> str:
        """The whole text, with settings in the words of whoever shows it."""
        sentences = [_text(self._pieces, words)]
        if self.valid is not None:
            sentences.append(f"Valid {self.valid_name}".rstrip() + f": {listed(self.valid)}.")
        if self.remedy:
            sentences.append(_text(self.remedy, words))
        return " ".join(sentences)

    def __str__(self) -> str:
        return self.worded(as_keyword)


def _text(pieces: Iterable[str | Setting], words: Words) -> str:
    text = "".join(piece if isinstance(piece, str) else words(piece) for piece in pieces)
    if len(text) <= LONGEST_TEXT:
        return text
    return f"{text[: LONGEST_TEXT // 2]} … {text[-LONGEST_TEXT // 2 :]}"


def setting_error(text: str) -> HelixError:
    """The error of a text in whose pieces `<name>` is the setting of that name."""
    return HelixError(with_settings(text))


class LaunchError(HelixError):
    """The ranks cannot be started, or do not know of each other. Every rank says so: it may be the only one."""


class DivergenceError(HelixError):
    """Training has left the finite numbers: nothing was wrong with the input, and going on is of no use."""

    status = 1


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return sorted({*low, *(number // k for k in low)})


def counted(number: int, noun: str, *, plural: str = "") -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(values: Iterable[object]) -> str:
    """`1, 2, 4` — or `none` for nothing."""
    return ", ".join(str(value) for value in values) or "none"


def did_you_mean(value: object, valid: Iterable[str], quote: str = "") -> tuple[str, ...]:
    """A question that names the valid word nearest to a mistyped one; empty if none is near."""
    close = difflib.get_close_matches(str(value), list(valid), n=1)
    return (f"Did you mean {quote}{close[0]}{quote}?",) if close else ()
