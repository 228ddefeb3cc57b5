"""A conversion's output while it is written: beside its target, resumable, published whole or not at all.

.NAME.converting/journal.jsonl   what is finished, one JSON object a line, each with its hash
.NAME.converting/content/        becomes the target NAME by one rename
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

from helix_megatron.checkpoint.durable import sync_directory, writing_errors
from helix_megatron.checkpoint.manifest import (
    FileEntry,
    file_names,
    has_manifest,
    problem,
    read_manifest,
)
from helix_megatron.checkpoint.publish import lock, publish, recover, remove, replaced
from helix_megatron.checkpoint.run_lock import LOCK
from helix_megatron.checkpoint.store import POINTER, is_complete
from helix_megatron.errors import HelixError, with_settings

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
        HelixError: the target exists, or another process is converting to it, or something else has the name
            of the directory that is written to, or the disk refuses.
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
        self._overwrite = overwrite
        self._lock: int | None = None
        self.records: dict[str, dict[str, Any]] = {}
        with writing_errors(self.target):
            self._check_names()
            recover(self.target)
            check_target(self.target, overwrite)
            try:
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self.root.mkdir(exist_ok=True)
            except FileNotFoundError as error:  # what /proc says to whoever writes to it
                raise HelixError(
                    f"no directory can be made in {self.target.parent}. Give another target."
                ) from error
            try:
                self._lock = lock(self.root)
            except BlockingIOError:
                raise HelixError(
                    f"another process is converting to {self.root}. Wait for it, or give another target."
                ) from None
            begun, records = self._journal(identity)
            linked = any(p.is_symlink() for p in (self.content, *self.content.rglob("*")))
            if not resume or not begun or linked:
                if resume and (self.root / JOURNAL).exists():
                    say(
                        f"An interrupted conversion to {self.target} was of another source or had other "
                        "settings, or its files were changed: this one starts afresh."
                    )
                remove(self.content)
                self._append({"identity": identity}, os.O_TRUNC)
            else:
                self._keep(records)
                if self.records:
                    say(f"Resuming: {len(self.records)} parts of {self.target} are finished.")
            self.content.mkdir(exist_ok=True)

    def record(self, unit: str, facts: dict[str, Any]) -> None:
        """Note that a part is finished; `facts` are JSON values. Its files are on the disk already."""
        for folder in {path.parent for path in map(self.content.joinpath, facts["files"])}:
            sync_directory(folder)
        self.records[unit] = facts
        self._append({"unit": unit, **facts})

    def publish(self) -> Path:
        """Make the content the target. It is complete, synced, with its manifest in place.

        Raises:
            HelixError: the target exists by now, or the disk refuses.
        """
        with writing_errors(self.target):
            check_target(self.target, self._overwrite)
            publish(self.content, self.target)
            self.close()
            for left in (self.root, replaced(self.target)):
                shutil.rmtree(left, ignore_errors=True)
        return self.target

    def close(self) -> None:
        """Let go of the directory; what is in it stays, for a conversion that resumes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_names(self) -> None:
        """Refuse what somebody else has put where this is going to write and remove."""
        old = replaced(self.target)
        journal = self.root / JOURNAL
        empty = self.root.is_dir() and not any(self.root.iterdir())
        ours = {self.root: empty or (journal.is_file() and not journal.is_symlink())}
        ours[old] = old.is_dir() and next(_foreign(old), None) is None
        for path, made_here in ours.items():
            if os.path.lexists(path) and (path.is_symlink() or not made_here):
                raise HelixError(
                    f"{path} is in the way, and no conversion made it. Move it away, or give another target."
                )

    def _keep(self, records: dict[str, dict[str, Any]]) -> None:
        """Keep the parts whose files are as the journal says; remove every other file."""
        for unit, record in records.items():
            entries = {name: FileEntry.from_json(entry) for name, entry in record["files"].items()}
            if all(entry and not problem(self.content / n, entry) for n, entry in entries.items()):
                self.records[unit] = record
        kept = {self.content / name for record in self.records.values() for name in record["files"]}
        for path in self.content.rglob("*"):
            if path not in kept and not path.is_dir():
                path.unlink()

    def _journal(self, identity: dict[str, Any]) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Whether there is a journal of this identity, and its records by part."""
        try:
            lines = (self.root / JOURNAL).read_bytes().splitlines()
        except FileNotFoundError:
            return False, {}
        entries = []
        for line in lines:  # the last one of a killed process may be half a line
            text, _, stated = line.rpartition(b" ")
            if stated.decode("ascii", "replace") == blake3(text).hexdigest():
                entries.append(json.loads(text))
        begun = bool(entries) and entries[0].get("identity") == json.loads(json.dumps(identity))
        return begun, {entry.pop("unit"): entry for entry in entries[1:] if "unit" in entry}

    def _append(self, entry: dict[str, Any], mode: int = os.O_APPEND) -> None:
        text = json.dumps(entry)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | mode
        with open(os.open(self.root / JOURNAL, flags, 0o666), "w") as file:
            # A half line before it stays a line of its own.
            file.write(f"\n{text} {blake3(text.encode()).hexdigest()}")
            file.flush()
            os.fsync(file.fileno())


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it may be replaced: an empty directory, or one that we made."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise HelixError(
            f"{target} is a {'link' if target.is_symlink() else 'file'}. Give a directory that does not exist "
            "yet."
        )
    if any(target.iterdir()) and not overwrite:
        raise HelixError(
            f"{target} exists.",
            remedy=with_settings(
                "Give a directory that does not, or <overwrite> to replace it once the new one is complete."
            ),
        )
    if foreign := next(_foreign(target), None):
        raise HelixError(
            f"{target} holds {foreign}, which no conversion and no save made, so it is not replaced. Move it "
            "away, or give another target."
        )


def _foreign(directory: Path) -> Iterator[str]:
    """Names of what is in a directory and belongs to no checkpoint: in its manifest, or in one of a store."""
    if has_manifest(directory):
        yield from sorted(set(file_names(directory)) - read_manifest(directory).files.keys())
        return
    for path in sorted(directory.iterdir()):
        checkpoint = path.name == "release" or re.fullmatch(r"iter_\d{7,}", path.name)
        if checkpoint and path.is_dir() and not path.is_symlink() and is_complete(path):
            if has_manifest(path):
                yield from (f"{path.name}/{name}" for name in _foreign(path))
        elif path.name not in (POINTER, LOCK):
            yield path.name
