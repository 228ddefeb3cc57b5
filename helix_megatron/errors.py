"""The one exception that a user's mistake raises.

Every message names the value, the valid values and what to try. Command lines print it alone, without a
traceback, and exit with code 2 (`exit_on_error`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator


class HelixError(ValueError):
    """Something that the user can put right: a setting, a file, a layout that cannot be."""


def divisors(number: int) -> list[int]:
    """All divisors of a positive integer, ascending."""
    return [k for k in range(1, number + 1) if number % k == 0]


def listed(values: Iterable[object]) -> str:
    """`1, 2, 4` — or `none` for nothing."""
    return ", ".join(str(value) for value in values) or "none"


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Turn a `HelixError` into one paragraph on standard error and exit code 2.

    Under a launcher only the first rank prints, so that eight ranks do not say the same thing eight times.
    """
    try:
        yield
    except HelixError as error:
        if os.environ.get("RANK", "0") == "0":
            text = textwrap.fill(
                f"{program}: error: {error}",
                width=100,
                break_on_hyphens=False,  # paths and flags stay whole, to be copied
                break_long_words=False,
            )
            print(text, file=sys.stderr, flush=True)
        sys.exit(2)
