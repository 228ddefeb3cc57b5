"""Where `torch.save` has put the bytes of a tensor: its format is an uncompressed zip archive."""

from __future__ import annotations

import io
import os
import zipfile
from typing import IO, Any

LOCAL_HEADER = 30  # bytes before the name of an entry; its lengths are in the last four


def storage_records(file: IO[bytes]) -> dict[int, tuple[int, int]]:
    """Number of each storage in an archive → (offset from the archive's start, bytes).

    `torch.save` numbers storages in the order in which its pickle comes to them.

    Args:
        file: seekable; nothing but the archive.

    Raises:
        zipfile.BadZipFile: no zip archive.
        ValueError: a compressed entry.
    """
    found = {}
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    for entry in entries:
        folder, _, number = entry.filename.rpartition("/")
        if not folder.endswith("/data") or not number.isdigit():
            continue
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed, which torch.save does not do")
        file.seek(entry.header_offset + LOCAL_HEADER - 4)
        lengths = file.read(4)
        names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        found[int(number)] = entry.header_offset + LOCAL_HEADER + names, entry.file_size
    return found


class Slice(io.RawIOBase):
    """`length` bytes of a file from `start`, as a file of their own. Closing it leaves the file open."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if origin + offset < 0:
            raise OSError("a position before the beginning")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
