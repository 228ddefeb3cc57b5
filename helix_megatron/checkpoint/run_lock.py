"""One training run at a time saves to a directory: two would take turns in each other's iterations.

The lock is the system's own on a file, so it ends with the process that holds it, however that ends. The file
tells who holds it, and is removed by a run that ends well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from helix_megatron.checkpoint.durable import writing_errors
from helix_megatron.errors import HelixError, with_settings

LOCK = ".run.lock"
_held: set[int] = set()


@contextlib.contextmanager
def sole_run(root: Path) -> Iterator[None]:
    """Be the only run that saves to a directory, which exists, inside the block.

    Raises:
        HelixError: another run saves there; it names its process.
    """
    path = root / LOCK
    with writing_errors(root):
        descriptor = _locked(path)
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # who it is only helps to find it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while the lock is held: who waits for this file sees that it is gone
        _held.discard(descriptor)
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the file that has this name and whose lock is ours."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # another user's, who shares the directory
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode("ascii", "replace") or "another process"
            os.close(descriptor)
            raise HelixError(
                f"another run saves to {path.parent}: {holder}.",
                remedy=with_settings(
                    "Wait until it has ended, end it, or give this one another directory (<save>). Ranks that "
                    "were meant to be one run need a launcher's environment, or <nproc_per_node>."
                ),
            ) from None
        except OSError:  # not every network file system knows locks
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)  # its run has just ended, and removed it


def _leave_to_parent() -> None:
    """A forked writer of a background save must not hold the lock of a run that was killed."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
