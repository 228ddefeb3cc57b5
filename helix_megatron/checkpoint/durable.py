"""Writing that survives a crash, and what to tell a user when it cannot be done."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from helix_megatron.errors import HelixError

INTACT = "Checkpoints that were complete before are intact."
# How libraries written in C++ and Rust word what Python calls OSError.
TORCH_WRITER = re.compile(
    r"PytorchStreamWriter|inline_container|iostream error|file write failed|error: <class 'OSError'>"
)
RUST_ERROR = re.compile(r"\(os error (\d+)\)")

EXPLANATIONS = {
    errno.EDQUOT: "your quota on this disk is used up. Delete files, or save to another directory.",
    errno.EROFS: "the file system is read-only. Save to another directory, or remount it.",
    errno.EACCES: "permission denied. Save to a directory of your own, or have its permissions changed.",
    errno.EPERM: "permission denied. Save to a directory of your own, or have its permissions changed.",
    errno.ENAMETOOLONG: "the path is too long. Choose a shorter one.",
    errno.ENOTDIR: "a part of the path is a file, not a directory. Choose another one.",
    errno.EEXIST: "a part of the path is a file, not a directory. Choose another one.",
    errno.ELOOP: "a link in the path leads to itself. Choose another path.",
    errno.EFBIG: (
        "a file would exceed the largest size allowed. Raise the limit (ulimit -f), or choose a file system "
        "that allows it."
    ),
}


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that is there whole or, after a crash at any moment, as it was before.

    Raises:
        OSError: it cannot be written; nothing has changed then.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Put the names in a directory, not the content of its files, on the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directories(directory: Path) -> None:
    """`sync_directory` for a directory and all below it."""
    for folder, _, _ in os.walk(directory):
        sync_directory(Path(folder))


@contextlib.contextmanager
def writing_errors(path: Path | str) -> Iterator[None]:
    """Turn what an operating system says about a write below `path` into an error for people.

    No space, over quota, read-only, no permission, name too long, not a directory, file too big. Whatever
    else is raised passes through. `path` need not exist.

    Raises:
        HelixError: names the directory and what to try.
    """
    try:
        yield
    except HelixError:
        raise
    except Exception as error:
        code = _error_number(error, Path(path))
        text = _explanation(code, Path(path))
        if text is None:
            raise
        file = getattr(error, "filename", None)
        where = f" (at {file})" if file and str(file) != str(path) else ""
        raise HelixError(f"cannot write to {path}{where}: {text} {INTACT}") from error


def _error_number(error: Exception, path: Path) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    rust = RUST_ERROR.search(str(error))
    if rust:
        return int(rust.group(1))
    if isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)):
        # Neither torch.save nor megatron-core 0.19 tells why it could not write. When the disk is nearly
        # full, that is why.
        usage = shutil.disk_usage(_existing(path))
        if usage.free < max(1 << 20, usage.total // 1000):
            return errno.ENOSPC
    return None


def _explanation(code: int | None, path: Path) -> str | None:
    if code == errno.ENOSPC:
        place = _existing(path)
        usage = shutil.disk_usage(place)
        return (
            f"no space is left: {_size(usage.free)} of {_size(usage.total)} are free on the disk of {place}. "
            "Free some, save to another directory, or keep fewer checkpoints."
        )
    return EXPLANATIONS.get(code or 0)


def _existing(path: Path) -> Path:
    """The nearest directory upwards that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _size(count: int) -> str:
    amount = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.4g} TB"
