"""Files that a conversion writes: each byte is handed over once, and hashed while it is in the cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from blake3 import blake3

from helix_megatron.checkpoint.manifest import FileEntry

# Given more at once, Linux looks for large blocks of free memory, which can take longer than all the rest.
WRITE_BYTES = 128 << 10
FLUSH_BYTES = 32 << 20  # the disk is given so much at a time while more is being written


class OutputFile:
    """A file that is written from its beginning to its end.

    Args:
        path: of the file. What lies under that name is removed first, so that a link is never followed.
    """

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self._descriptor: int | None = os.open(path, flags, 0o666)
        self._hash = blake3()
        self._flushed = 0
        self.written = 0

    def write(self, content: bytes | memoryview) -> int:
        """Append bytes of any shape and type that are contiguous; how many there were."""
        assert self._descriptor is not None
        view = memoryview(content).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            chunk = view[start : start + WRITE_BYTES]
            self._hash.update(chunk)
            while chunk:  # the kernel may take less than it is offered
                count = os.write(self._descriptor, chunk)
                chunk = chunk[count:]
                self.written += count
            if self.written - self._flushed >= FLUSH_BYTES:
                self._start_flushing()
        return len(view)

    def finish(self) -> FileEntry:
        """Put everything on the disk and close the file; its size and hash."""
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self.close()
        return FileEntry(self.written, self._hash.hexdigest())

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_flushing(self) -> None:
        """Have the kernel write out what it has, and go on at once; `fsync` then waits for little.

        Linux starts to write pages that it is told will not be needed any more.
        """
        if hasattr(os, "posix_fadvise"):
            assert self._descriptor is not None
            length = self.written - self._flushed
            os.posix_fadvise(self._descriptor, self._flushed, length, os.POSIX_FADV_DONTNEED)
        self._flushed = self.written
