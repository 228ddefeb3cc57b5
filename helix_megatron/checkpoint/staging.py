"""A conversion's output while it is written: beside its target, resumable, published whole or not at all.

.NAME.converting/journal.jsonl   what is finished, one JSON object a line
.NAME.converting/content/        becomes the target NAME by one rename
.NAME.replaced                   the old target, between that rename and its removal
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.durable import sync_directory, writing_errors
from helix_megatron.checkpoint.manifest import FileEntry, digest
from helix_megatron.errors import HelixError

JOURNAL = "journal.jsonl"


class Staging:
    """Where a conversion writes to.

    Args:
        target: directory that the result becomes.
        identity: what the result depends on (source files, settings), as JSON values. Work of an interrupted
            conversion with another identity is thrown away.
        overwrite: replace a target that exists.
        say: called with a line for the user.

    Raises:
        HelixError: the target exists, or another process is converting to it, or the disk refuses.
    """

    def __init__(
        self,
        target: Path,
        identity: dict[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        self.target = Path(os.path.abspath(target))
        self.root = self.target.with_name(f".{self.target.name}.converting")
        self.content = self.root / "content"
        self._replaced = self.target.with_name(f".{self.target.name}.replaced")
        self._overwrite = overwrite
        with writing_errors(self.target):
            self._recover()
            check_target(self.target, overwrite)
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(exist_ok=True)
            self._lock: int | None = _locked(self.root)
            self.records = self._journal(identity) if resume else None
            if self.records is None:
                if (self.root / JOURNAL).exists() and resume:
                    say(
                        f"An interrupted conversion to {self.target} was of another source or had other "
                        "settings: this one starts afresh."
                    )
                self._clear()
                self.records = {}
                self._append({"identity": identity})
            elif self.records:
                say(f"Resuming: {len(self.records)} parts of {self.target} are finished.")
            self.content.mkdir(exist_ok=True)

    def finished(self, unit: str) -> dict[str, Any] | None:
        """What `record` was given for a part, if its files are still as they were."""
        assert self.records is not None
        record = self.records.get(unit)
        if record is None:
            return None
        for name, entry in record.get("files", {}).items():
            path = self.content / name
            if not path.is_file() or digest(path) != FileEntry(**entry):
                return None
        return record

    def record(self, unit: str, **facts: Any) -> None:
        """Note that a part is finished; `facts` are JSON values. Its files are on the disk already."""
        assert self.records is not None
        sync_directory(self.content)
        self.records[unit] = facts
        self._append({"unit": unit, **facts})

    def publish(self) -> Path:
        """Make the content the target. It is complete, synced, with its manifest in place.

        Raises:
            HelixError: the target exists by now, or the disk refuses.
        """
        with writing_errors(self.target):
            check_target(self.target, self._overwrite)
            if self.target.exists():
                os.rename(self.target, self._replaced)
                sync_directory(self.target.parent)
            os.rename(self.content, self.target)
            sync_directory(self.target.parent)
            self.close()
            for left in (self.root, self._replaced):
                shutil.rmtree(left, ignore_errors=True)
        return self.target

    def close(self) -> None:
        """Let go of the directory; what is in it stays, for a conversion that resumes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _recover(self) -> None:
        """Finish what a killed `publish` began."""
        if self._replaced.exists():
            if self.target.exists():
                shutil.rmtree(self._replaced)
            else:
                os.rename(self._replaced, self.target)
                sync_directory(self.target.parent)

    def _journal(self, identity: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """Records by part; None if there is no journal of this identity."""
        try:
            lines = (self.root / JOURNAL).read_text().splitlines()
        except FileNotFoundError:
            return None
        entries = []
        for line in lines:
            with contextlib.suppress(
                ValueError
            ):  # the last one of a killed process may be half a line
                entries.append(json.loads(line))
        if not entries or entries[0].get("identity") != json.loads(json.dumps(identity)):
            return None
        found = {}
        for entry in entries[1:]:
            if isinstance(entry, dict) and "unit" in entry:
                found[entry.pop("unit")] = entry
        return found

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.root / JOURNAL, "a") as file:
            file.write("\n" + json.dumps(entry))  # a half line before it stays a line of its own
            file.flush()
            os.fsync(file.fileno())

    def _clear(self) -> None:
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it may be replaced.

    Raises:
        HelixError: names it.
    """
    if not target.exists() or (overwrite and target.is_dir()):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    if not target.is_dir():
        raise HelixError(f"{target} is a file. Give a directory that does not exist yet.")
    raise HelixError(
        f"{target} exists. Give a directory that does not, or --overwrite to replace it once the new one is "
        "complete."
    )


def _locked(directory: Path) -> int:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise HelixError(
            f"another process is converting to {directory}. Wait for it, or give another target."
        ) from None
    return descriptor


class FollowingDigest:
    """Hashes a file in a thread while it is written, and pushes it to the disk meanwhile.

    Args:
        path: of a file that only grows.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._known, self._ended = 0, False
        self._changed = threading.Condition()
        self._hash = hashlib.sha256()
        self._size = 0
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def advance(self, size: int) -> None:
        """`size` bytes of the file have been handed to the operating system."""
        with self._changed:
            self._known = size
            self._changed.notify()

    def finish(self, size: int) -> FileEntry:
        """Size and hash of the whole file.

        Raises:
            OSError: it cannot be read.
        """
        with self._changed:
            self._known, self._ended = size, True
            self._changed.notify()
        self._thread.join()
        self._file.close()
        if self._problem is not None:
            raise self._problem
        assert self._size == size, "the file is not as long as it was said to be"
        return FileEntry(self._size, self._hash.hexdigest())

    def _follow(self) -> None:
        buffer = memoryview(bytearray(4 << 20))
        try:
            while True:
                with self._changed:
                    while self._known == self._size and not self._ended:
                        self._changed.wait()
                    known, ended = self._known, self._ended
                while self._size < known:
                    count = self._file.readinto(buffer[: min(len(buffer), known - self._size)])
                    if not count:
                        return
                    self._hash.update(buffer[:count])
                    self._size += count
                if ended:
                    return
        except BaseException as error:
            self._problem = error


@contextlib.contextmanager
def following(path: Path) -> Iterator[FollowingDigest]:
    """A `FollowingDigest` whose thread ends with the block, whatever happens in it."""
    digester = FollowingDigest(path)
    try:
        yield digester
    finally:
        if digester._thread.is_alive():
            with digester._changed:
                digester._known, digester._ended = digester._size, True
                digester._changed.notify()
            digester._thread.join()
        digester._file.close()
