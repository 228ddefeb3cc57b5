"""What commands write beside what they print: to a file, into a directory, or, for `-`, to standard output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TextIO

from helix_megatron.errors import HelixError, Setting, listed

STANDARD_OUTPUT = "-"
PICTURES = (".png", ".svg")
# Where results go while what is printed for people goes elsewhere.
_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


def check_file(setting: str, path: str | Path | None, endings: Sequence[str] = ()) -> None:
    """Find out before a long run that its result could not be written.

    Args:
        setting: that names the file.
        path: the file; nothing is checked without one, or for standard output.
        endings: what its name may end in; anything when not given.

    Raises:
        HelixError: another ending, a directory, or one that does not exist or cannot be written to.
    """
    if path is None or str(path) == STANDARD_OUTPUT:
        return
    path = Path(path)
    if endings and path.suffix not in endings:
        raise HelixError(
            (Setting(setting, path), f": the name must end in {' or '.join(endings)}."),
            setting=setting,
            value=path,
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        why = "it is a directory" if path.is_dir() else f"{path.parent} is no directory to write to"
        raise HelixError(
            (
                Setting(setting, path),
                f" cannot be written: {why}. Give a file in a directory that exists.",
            ),
            setting=setting,
            value=path,
        )


def check_free(paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse to replace files that the user has not named.

    Raises:
        HelixError: some are there, and may not be replaced.
    """
    taken = [] if overwrite else [path for path in paths if os.path.lexists(path)]
    if taken:
        names, directory = listed(path.name for path in taken), taken[0].parent
        raise HelixError(
            (
                f"{directory} holds {names} already. Give another directory, or replace what is there: ",
                Setting("overwrite"),
                ".",
            )
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text to a file, or to standard output.

    Raises:
        HelixError: the file cannot be written.
    """
    if str(path) == STANDARD_OUTPUT:
        print(text, end="", file=_results.get() or sys.stdout, flush=True)
        return
    try:
        Path(path).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise HelixError(f"cannot write {path}: {error.strerror}.") from error


@contextlib.contextmanager
def results_alone(path: str | Path | None) -> Iterator[None]:
    """While results go to standard output, what is printed for people goes to standard error."""
    alone = path is not None and str(path) == STANDARD_OUTPUT
    if not alone:
        yield
        return
    before = _results.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _results.reset(before)
