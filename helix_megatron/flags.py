"""Fields of dataclasses as flags of a command line.

A field made by `setting` carries, once, the help of its flag, the values it may have, and what it decides. From
it come the rows of a parser (`add_flags`), the values of a command line or a file that belong to a dataclass
(`values_of`), and the refusal of a value that cannot be (`check_values`).
"""

from __future__ import annotations

import argparse
import dataclasses
import operator
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

LARGEST = 2**63 - 1  # what a whole number may be that a field says nothing else of


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
            ones at least 1 and others at least 0.
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
            row |= {"type": f.metadata["parse"] or kind_of(f)}
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
    if kind is None:
        return None
    if type(value) is not kind and not (kind is float and type(value) is int):
        article = {bool: "true or false", str: "a text"}.get(kind) or _wanted(f, kind)
        return f"It must be {article}."
    if isinstance(value, int | float) and not _is_within(value, bounds_of(f)):
        return f"It must be {_wanted(f, kind)}."
    largest = f.metadata.get("largest", LARGEST)
    if kind is int and value > largest:
        return f"The largest valid value is {largest:,}."
    return None


def bounds_of(f: dataclasses.Field[Any]) -> dict[str, float]:
    """The range of a field's numbers; its lower end comes first."""
    given = f.metadata["bounds"]
    lowest = (
        {} if {"at least", "above"} & given.keys() else {"at least": 1 if kind_of(f) is int else 0}
    )
    return lowest | given


def _is_within(value: float, bounds: Mapping[str, float]) -> bool:
    return abs(value) <= sys.float_info.max and all(
        WITHIN[words](value, bound) for words, bound in bounds.items()
    )


def _wanted(f: dataclasses.Field[Any], kind: type) -> str:
    number = "a whole number" if kind is int else "a finite number"
    bounds = " and ".join(f"{words} {bound}" for words, bound in bounds_of(f).items())
    return f"{number} {'of ' if bounds.startswith('at least') else ''}{bounds}"
