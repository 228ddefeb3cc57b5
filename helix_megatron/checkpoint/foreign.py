"""Files and paths that nobody vouches for: what they hold may be damaged, endless, or made to do harm."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from helix_megatron.errors import HelixError

AGAIN = "Copy the model again from where it came."
MOST_JSON = 1 << 28  # bytes: the index of the largest models has a tenth of a percent of it
MOST_TEXT = 1 << 12
DEEPEST = 100  # objects and lists inside each other
LONGEST_NAME = 255  # bytes: what file systems allow


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    content = parse_json(read_bytes(path, MOST_JSON), path)
    if not isinstance(content, dict):
        raise HelixError(damaged(path, "no JSON object"))
    return content


def parse_json(
    content: bytes, path: Path | str, *, unique: bool = False, remedy: str = AGAIN
) -> Any:
    """What JSON holds; `path` is the file that errors speak of.

    Args:
        unique: refuse an object with one key twice, of which readers see different values.
        remedy: what to try where it is damaged.

    Raises:
        HelixError: it is no JSON, or nested too deeply to be used.
    """
    try:
        found = json.loads(content.decode(), object_pairs_hook=_unique if unique else None)
    except HelixError as error:
        raise HelixError(damaged(path, str(error), remedy)) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise HelixError(damaged(path, f"no valid JSON ({error})", remedy)) from error
    check_depth(found, path, remedy)
    return found


def check_depth(content: Any, path: Path | str, remedy: str = AGAIN) -> None:
    """Refuse JSON values that are nested deeper than any program nests them: what walks them would fail.

    Raises:
        HelixError: they are.
    """
    level: list[Any] = [[content]]
    for _ in range(DEEPEST + 1):
        lists = (value.values() if isinstance(value, dict) else value for value in level)
        level = [inner for values in lists for inner in values if isinstance(inner, dict | list)]
        if not level:
            return
    reason = f"no valid JSON (it is nested more than {DEEPEST} deep)"
    raise HelixError(damaged(path, reason, remedy))


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise HelixError(f"{twice!r:.120} is there twice")
    return found


def read_bytes(path: Path, limit: int, remedy: str = AGAIN) -> bytes:
    """A whole file of at most `limit` bytes; a pipe or a device, which may never end, is not read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HelixError(f"{path} is missing. {remedy}") from error
    except (OSError, ValueError) as error:
        raise HelixError(f"{path!s:.200} cannot be read: {_reason(error)}. {remedy}") from error
    try:
        status = os.fstat(descriptor)
        _check_status(path, status, limit, remedy)
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)  # of `limit` it would set aside the memory
    except OSError as error:
        raise HelixError(f"{path} cannot be read: {_reason(error)}. {remedy}") from error
    finally:
        os.close(descriptor)


def check_files(paths: Iterable[Path], limit: int = MOST_JSON) -> None:
    """Look at files that another library opens by itself: those that exist must be files, and not too long.

    Raises:
        HelixError: one is a pipe, a device or a directory, a link to itself, or longer than `limit` bytes.
    """
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise HelixError(f"{path} cannot be read: {_reason(error)}. {AGAIN}") from error
        _check_status(path, status, limit, AGAIN)


def _check_status(path: Path, status: os.stat_result, limit: int, remedy: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise HelixError(f"{path} is no file, but a directory, a pipe or a device. {remedy}")
    if status.st_size > limit:
        raise HelixError(f"{path} has {status.st_size:,} bytes, and {limit:,} are the most.")


def read_name(path: Path, remedy: str = AGAIN) -> str:
    """What a file of one line holds, such as a tag or a commit."""
    return read_bytes(path, MOST_TEXT, remedy).decode(errors="replace").strip()


def is_plain_name(name: object) -> TypeGuard[str]:
    """Whether this can name something inside a directory, and nothing outside of it."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    try:
        encoded = name.encode()
    except UnicodeEncodeError:  # half of a character
        return False
    return len(encoded) <= LONGEST_NAME and not {"/", "\0"} & set(name)


def resolved(path: Path | str) -> Path:
    """A path without links, whether something lies there or not.

    Raises:
        HelixError: nothing can have this path: it is too long, leads to itself, or has a NUL.
    """
    try:
        found = Path(path).resolve()
        os.lstat(found)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        raise HelixError(
            f"{str(path)!r:.120} cannot be a path: {_reason(error)}. Give another one."
        ) from error
    return found


def damaged(path: Path | str, reason: str, remedy: str = AGAIN) -> str:
    """The text of an error about a damaged file."""
    return f"{path} is damaged: {reason}. {remedy}"


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
