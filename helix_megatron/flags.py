"""Fields of dataclasses as flags of a command line.

A field made by `setting` carries, once, the help of its flag, the values it may have, and what it decides. From
it come the rows of a parser (`add_flags`), the values of a command line or a file that belong to a dataclass
(`values_of`), and the refusal of a value that cannot be (`check_values`).
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from helix_megatron.errors import HelixError, Setting, listed

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
WITHIN: dict[str, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "above": operator.gt,
    "below": operator.lt,
    "at most": operator.le,
}

# What numbers may be of which nothing else is said: beyond every machine, and far from where arithmetic ends.
LARGEST, LARGEST_REAL = 10**15, 1e30
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes: what file systems allow
LONGEST_TEXT = 10_000  # characters of a flag that is a name


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by argparse
class Number:
    """A number with a range. Called with the text of a flag it is a type of `argparse`."""

    kind: type
    bounds: Mapping[str, float]
    largest: float

    def __call__(self, text: str) -> Any:
        value = self.read(text)
        problem = self.problem_of(value)
        if problem:
            raise argparse.ArgumentTypeError(f"is {value!r:.60}. {problem}")
        return value

    def read(self, text: str) -> Any:
        """The number that a text spells, whatever its range."""
        try:
            return self.kind(text)
        except ValueError:
            wanted = f"It must be {self.wanted}."
            raise argparse.ArgumentTypeError(f"is {text!r:.60}. {wanted}") from None

    def problem_of(self, value: Any) -> str | None:
        """What a value must be instead, as a sentence; None of a value that it may have."""
        is_kind = type(value) is self.kind or (self.kind is float and type(value) is int)
        if not is_kind or not self._is_within(value):
            return f"It must be {self.wanted}."
        if value > self.largest:
            largest = f"{self.largest:,}" if self.kind is int else f"{self.largest:g}"
            return f"The largest valid value is {largest}."
        return None

    def _is_within(self, value: float) -> bool:
        return abs(value) <= sys.float_info.max and all(
            WITHIN[words](value, bound) for words, bound in self.bounds.items()
        )

    @property
    def wanted(self) -> str:
        """What it must be, after "It must be"."""
        number = "a whole number" if self.kind is int else "a finite number"
        bounds = " and ".join(f"{words} {bound}" for words, bound in self.bounds.items())
        return f"{number} {'of ' if bounds.startswith('at least') else ''}{bounds}"


def whole(at_least: int = 1, largest: int = LARGEST) -> Number:
    """Whole numbers in a range."""
    return Number(int, {"at least": at_least}, largest)


def real(largest: float = LARGEST_REAL, **bounds: float) -> Number:
    """Finite numbers in a range: `above=0`, `at_most=1`; at least 0 when not told."""
    named = {words.replace("_", " "): bound for words, bound in bounds.items()}
    return Number(float, named or {"at least": 0}, largest)


@dataclasses.dataclass(frozen=True)
class PathText:
    """The text of a flag that names a file or a directory, as a type of `argparse`.

    Args:
        to_write: it is written to; then `-`, which means standard output elsewhere, is no name.
        or_standard_output: then `-` is as good as a name.
    """

    kind: str = "file"
    to_write: bool = False
    or_standard_output: bool = False

    def __call__(self, text: str) -> str:
        problem = self._problem_of(text)
        if problem:
            raise argparse.ArgumentTypeError(f"is {text!r:.60}. {problem}")
        return text

    def _problem_of(self, text: str) -> str | None:
        if not text:
            return f"It must name a {self.kind}."
        if _has_control_characters(text):
            return f"The name of a {self.kind} has no line breaks and no other control characters."
        encoded = os.fsencode(text)
        if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_NAME:
            return "It is too long for a name."
        if text == "-" and self.to_write and not self.or_standard_output:
            return f"Standard output cannot take what goes there. Name a {self.kind}; ./- is one called so."
        return None


INPUT_FILE, INPUT_DIRECTORY, INPUT = (
    PathText(),
    PathText("directory"),
    PathText("file or directory"),
)
OUTPUT_FILE, OUTPUT_DIRECTORY = PathText("file", True), PathText("directory", True)
OUTPUT_TEXT = PathText("file", True, or_standard_output=True)


def whole_or_real(text: str) -> int | float:
    """A type of `argparse`: a number, which is whole where it has no fraction, as files of it then say."""
    value = Number(float, {}, LARGEST_REAL).read(text)
    return int(value) if value.is_integer() else float(value)


def one_line(text: str) -> str:
    """A type of `argparse`: a name, or another text of one line."""
    if not text.strip() or _has_control_characters(text) or len(text) > LONGEST_TEXT:
        raise argparse.ArgumentTypeError(
            f"is {text!r:.60}. It must be a text of one line, not empty, without control characters."
        )
    return text


def _has_control_characters(text: str) -> bool:
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def setting(
    default: Any,
    help_text: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    parse: Callable[[str], Any] | None = None,
    several: bool = False,
    is_flag: bool = True,
    **facts: Any,
) -> Any:
    """A field with a flag of its name.

    Args:
        default: the flag's.
        help_text: the flag's.
        choices: the valid words.
        at_least, above, below, at_most: the range of a number. Without being told, numbers are finite, whole
            ones at least 1 and others at least 0, and no larger than `LARGEST` and `LARGEST_REAL`.
        parse: reads the flag's text where its type is none of `KINDS`; raises
            `argparse.ArgumentTypeError`.
        several: whether the flag takes several words.
        is_flag: False for what only files say.
        **facts: what else there is to know about the field, for those that read it. `largest` is a whole
            number beyond every model and machine: above it a value is a mistake, or an attack.
    """
    bounds = {"at least": at_least, "above": above, "below": below, "at most": at_most}
    metadata = {
        "help": help_text,
        "choices": choices,
        "bounds": {words: bound for words, bound in bounds.items() if bound is not None},
        "parse": parse,
        "several": several,
        "is_flag": is_flag,
    }
    return dataclasses.field(default=default, metadata=metadata | facts)


def flag_of(name: str) -> str:
    """The flag of a field or destination name: `--num-layers` for `num_layers`."""
    return "--" + name.replace("_", "-")


def names_with(settings: type, **facts: Any) -> tuple[str, ...]:
    """The fields of a dataclass whose metadata has these entries."""
    return tuple(
        f.name
        for f in dataclasses.fields(settings)
        if all(f.metadata.get(fact) == value for fact, value in facts.items())
    )


def add_flags(
    group: Any, settings: type, names: Collection[str] | None = None, *, defaults: bool = True
) -> None:
    """Add the flags of a dataclass's fields to a parser or one of its groups.

    Args:
        group: `argparse`'s.
        settings: the dataclass.
        names: the fields; all when not given.
        defaults: whether flags have the fields' defaults; without, what is not given is not in the namespace.
    """
    for f in dataclasses.fields(settings):
        if not f.metadata.get("is_flag") or (names is not None and f.name not in names):
            continue
        text = f.metadata["help"].replace("%", "%%")
        default = f.default if defaults else argparse.SUPPRESS
        row: dict[str, Any] = {"default": default, "help": text}
        if kind_of(f) is bool:
            group.add_argument(flag_of(f.name), action="store_true", **row)
            continue
        if defaults and default is not None:
            row["help"] += " (default: %(default)s)"
        if f.metadata["choices"]:
            row["choices"] = f.metadata["choices"]
        else:
            number = number_of(f)
            row |= {"type": f.metadata["parse"] or (number.read if number else one_line)}
            row |= {"nargs": "+"} if f.metadata["several"] else {}
        group.add_argument(flag_of(f.name), **row)


def kind_of(f: dataclasses.Field[Any]) -> type | None:
    """The type of a field's values; None where `parse` makes them, or there are several."""
    return KINDS.get(str(f.type).removesuffix(" | None"))


def values_of(settings: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are fields of the dataclass."""
    return {f.name: values[f.name] for f in dataclasses.fields(settings) if f.name in values}


def check_values(settings: Any) -> None:
    """Check every field of a dataclass instance by itself; None is what was not given.

    Raises:
        HelixError: a value of another type, an unknown word, a number outside of its range.
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name, None)  # what others imply may be set later
        if not f.metadata or (value is None and (f.default is None or "None" in str(f.type))):
            continue
        problem = problem_of(f, value)
        if problem:
            raise HelixError(
                (Setting(f.name), f" is {value!r:.200}. {problem}"), setting=f.name, value=value
            )


def problem_of(f: dataclasses.Field[Any], value: Any) -> str | None:
    """What a value of a field must be instead, as a sentence; None of a value that it may have."""
    kind, choices = kind_of(f), f.metadata["choices"]
    if choices and value not in choices:
        return f"Valid: {listed(choices)}."
    number = number_of(f)
    if number is not None:
        return number.problem_of(value)
    if kind is not None and type(value) is not kind:
        return f"It must be {'true or false' if kind is bool else 'a text'}."
    return None


def number_of(f: dataclasses.Field[Any]) -> Number | None:
    """The range of a field's numbers, its lower end first; None where it has none."""
    kind, given = kind_of(f), f.metadata["bounds"]
    if kind not in (int, float):
        return None
    lowest = {} if {"at least", "above"} & given.keys() else {"at least": int(kind is int)}
    default = LARGEST if kind is int else LARGEST_REAL
    return Number(kind, lowest | given, f.metadata.get("largest", default))
