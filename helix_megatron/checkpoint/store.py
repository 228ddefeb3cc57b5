"""A directory of checkpoints that a kill at any moment leaves loadable.

    DIR/iter_0000010/                       a complete checkpoint
    DIR/latest_checkpointed_iteration.txt   the pointer: "10"
    DIR/.iter_0000020.saving-1f3a…          being written
    DIR/.iter_0000010.replaced              the old one while another of the same iteration takes its place
    DIR/.iter_0000005.removing-1f3a…        being deleted

Only the first two are read by Megatron. Everything that changes what is loaded is one rename, after all that
it depends on is on the disk:

1. `begin` makes a fresh `.saving` directory; files are written into it, its manifest last.
2. `commit` renames it. A complete checkpoint of the same iteration is first renamed to `.replaced`; readers
   take that one while the final name is free.
3. The pointer is replaced. Until then, the checkpoint before is loaded.
4. What is no longer needed is renamed to `.removing`, then deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from helix_megatron.checkpoint.durable import (
    sync_directories,
    sync_directory,
    write_durably,
    writing_errors,
)
from helix_megatron.checkpoint.foreign import read_name
from helix_megatron.checkpoint.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    TRY,
    has_manifest,
    read_manifest,
)
from helix_megatron.checkpoint.publish import in_use, lock, publish, recover, remove, replaced
from helix_megatron.errors import HelixError, listed, with_settings

__all__ = ["POINTER", "Store", "is_complete", "is_same_directory", "writing_errors"]

POINTER = "latest_checkpointed_iteration.txt"
CHECKPOINT = re.compile(r"iter_(\d{7,})")
REPLACED = re.compile(r"\.iter_(\d{7,})\.replaced")
LEFTOVER = re.compile(r"\.iter_(\d{7,})\.(saving-[0-9a-f]+|removing(-[0-9a-f]+)?)")
STOCK_FILES = ("metadata.json", ".metadata")  # megatron-core writes the first one last


def is_complete(directory: Path) -> bool:
    """Whether a directory is a checkpoint, of this package or of stock megatron-core."""
    if (directory / MANIFEST_NAME).is_file():
        return True
    if (directory / CHECKSUM_NAME).exists():
        return False  # one of ours that lost its manifest
    return all((directory / name).is_file() for name in STOCK_FILES)


def is_same_directory(one: Path | str, other: Path | str) -> bool:
    """Whether two names, through links and `..`, are of one directory, which need not exist yet."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return os.path.realpath(one) == os.path.realpath(other)


class Store:
    """The checkpoints of one training run, by iteration.

    One process writes (`begin`, `commit`, `abort`, `prune`). Reading writes nothing, so that it works in a
    read-only directory, and any process may do it at any time.

    Args:
        root: the directory; it need not exist before the first `begin`.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        # Iteration → its directory, and a descriptor whose lock says that a live process writes to it.
        self._staging: dict[int, tuple[Path, int]] = {}

    def path(self, iteration: int) -> Path:
        """Where the checkpoint of an iteration lies once it is complete."""
        return self.root / f"iter_{iteration:07d}"

    # ---------------------------------------------------------------- writing

    def begin(self, iteration: int) -> Path:
        """A fresh, empty directory to write the checkpoint of an iteration to.

        What an earlier attempt at this iteration left behind is removed. A process that still writes there
        cannot disturb the new attempt: every attempt has a name of its own.

        Raises:
            HelixError: the directory cannot be written to, or is no directory.
        """
        if iteration < 0:
            raise HelixError(f"iteration is {iteration}. It must not be negative.")
        self.abort(iteration)
        with writing_errors(self.root):
            _make_durable_directory(self.root)
            self._recover()
            self._sweep(iteration)
            staging = self.root / f".{self.path(iteration).name}.saving-{secrets.token_hex(8)}"
            staging.mkdir()
            sync_directory(self.root)
            self._staging[iteration] = staging, lock(staging)
        return staging

    def check_writable(self) -> None:
        """Tell early what `begin` would run into; changes nothing."""
        existing = next(
            path for path in (self.root, *self.root.absolute().parents) if path.exists()
        )
        with writing_errors(self.root):
            if not existing.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(existing))
            if not os.access(existing, os.W_OK | os.X_OK):
                read_only = bool(os.statvfs(existing).f_flag & os.ST_RDONLY)
                number = errno.EROFS if read_only else errno.EACCES
                raise OSError(number, os.strerror(number), str(existing))

    def prepare(self) -> None:
        """Make the directory, so that what stands against it shows before anything is worth saving.

        Raises:
            HelixError: it cannot be made or written to, or is no directory.
        """
        try:
            with writing_errors(self.root):
                _make_durable_directory(self.root)
        except FileNotFoundError as error:  # /proc, for one, makes no directories
            raise HelixError(
                f"{self.root} cannot be made. Save to a directory of an ordinary file system."
            ) from error
        self.check_writable()

    def commit(self, iteration: int, *, keep: int | None = None) -> Path:
        """Make what was written since `begin` the checkpoint of its iteration, and the one to load.

        Its manifest must be in place (`write_manifest`) and agree with the files' names and sizes.

        Args:
            iteration: as given to `begin`.
            keep: then `prune` to so many.

        Returns:
            The directory of the complete checkpoint.

        Raises:
            HelixError: the manifest is missing or disagrees, or the disk refuses. What was complete before
                stays so.
        """
        if keep is not None:
            _check_keep(keep)
        assert iteration in self._staging, f"commit({iteration}) without begin({iteration})"
        staging, _ = self._staging[iteration]
        _check_sizes(staging)
        final = self.path(iteration)
        with writing_errors(self.root):
            sync_directories(staging)
            if not is_complete(final):
                _set_aside(final)
            publish(staging, final)
            self._forget(iteration)
            write_durably(self.root / POINTER, str(iteration).encode())
        with _resisting():
            remove(replaced(final))
            if keep is not None:
                self.prune(keep)
        return final

    def abort(self, iteration: int) -> None:
        """Remove what was written since `begin`, if anything. Never raises for what cannot be removed."""
        if iteration in self._staging:
            staging, _ = self._staging[iteration]
            self._forget(iteration)
            shutil.rmtree(staging, ignore_errors=True)

    def prune(self, keep: int) -> None:
        """Delete the checkpoints of the lowest iterations until `keep` are left, and leftovers of killed saves.

        Never deleted: the newest complete checkpoint, the one that the pointer names, and those that stock
        Megatron wrote (without a manifest), which do not count either.

        Raises:
            HelixError: `keep` is not positive, or the disk refuses.
        """
        _check_keep(keep)
        with writing_errors(self.root):
            self._recover()
            own = [i for i in self.complete() if (self.path(i) / MANIFEST_NAME).is_file()]
            for iteration in own[:-keep]:
                if iteration not in (self._pointer(), self.latest()):
                    remove(self.path(iteration))
            self._sweep()

    def try_to_prune(self, keep: int) -> None:
        """`prune`, with a warning for what cannot be removed."""
        with _resisting():
            self.prune(keep)

    def _recover(self) -> None:
        """Finish what a killed `commit` began: its replaced checkpoint goes back, or goes away."""
        for entry, iteration in self._matching(REPLACED):
            if not is_complete(entry):
                remove(entry)
            elif not is_complete(self.path(iteration)):
                _set_aside(self.path(iteration))
            recover(self.path(iteration))

    def _sweep(self, only: int | None = None) -> None:
        """Delete directories that killed processes left, unless a live process writes to them."""
        for entry, iteration in self._matching(LEFTOVER):
            ours = entry.is_dir() and not entry.is_symlink()  # rmtree waits for a pipe's writer
            if ours and only in (None, iteration) and not in_use(entry):
                shutil.rmtree(entry)

    def _forget(self, iteration: int) -> None:
        _, descriptor = self._staging.pop(iteration)
        os.close(descriptor)

    def _matching(self, pattern: re.Pattern[str]) -> list[tuple[Path, int]]:
        """Entries of the directory whose whole name matches, with their iterations, in order."""
        if not self.root.is_dir():
            return []
        matches = ((entry, pattern.fullmatch(entry.name)) for entry in sorted(self.root.iterdir()))
        found = [(entry, match.group(1)) for entry, match in matches if match]
        return [(entry, int(text)) for entry, text in found if text == f"{int(text):07d}"]

    # ---------------------------------------------------------------- reading

    def complete(self) -> list[int]:
        """The iterations of which there is a complete checkpoint, ascending.

        Complete is one with a manifest, or one without that stock megatron-core finished. The files are not
        looked into: `manifest.verify` does that.
        """
        entries = self._matching(CHECKPOINT) + self._matching(REPLACED)
        return sorted({iteration for entry, iteration in entries if is_complete(entry)})

    def latest(self) -> int | None:
        """The iteration to load: the one that the pointer names if it is complete, else the newest complete."""
        complete = self.complete()
        pointer = self._pointer()
        if pointer in complete:
            return pointer
        return complete[-1] if complete else None

    def is_unused(self) -> bool:
        """Whether no checkpoint was ever completed here. A pointer or a half that is left says that one was."""
        left = any((entry / CHECKSUM_NAME).exists() for entry, _ in self._matching(CHECKPOINT))
        pointed = os.path.lexists(self.root / POINTER)
        return not (left or pointed or is_complete(self.root) or self.complete())

    def resolve(self, iteration: int | None = None) -> Path:
        """The directory of the checkpoint to load.

        The root itself may be a checkpoint, too: `DIR/iter_0000010`, or any directory with a manifest.

        Raises:
            HelixError: there is none. The text lists those that there are.
        """
        if not self.root.is_dir():
            problem = "is a file" if self.root.exists() else "does not exist"
            raise HelixError(f"{self.root} {problem}. Give the directory that a run saved to.")
        match = CHECKPOINT.fullmatch(self.root.absolute().name)
        if (has_manifest(self.root) or is_complete(self.root)) and iteration in (
            None,
            int(match.group(1)) if match else None,
        ):
            return self.root
        if iteration is None and self._pointer_text() == "release":
            release = self.root / "release"  # Megatron's name for weights that no iteration trained
            if has_manifest(release) or is_complete(release):
                return release
        chosen = self.latest() if iteration is None else iteration
        for directory in () if chosen is None else (self.path(chosen), replaced(self.path(chosen))):
            if is_complete(directory):
                self._warn_of_pointer(iteration, chosen)
                return directory
        raise HelixError(self._nothing_text(iteration))

    def _pointer_text(self) -> str:
        with contextlib.suppress(HelixError):
            return read_name(self.root / POINTER)
        return ""

    def _pointer(self) -> int | None:
        text = self._pointer_text()
        return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None

    def _warn_of_pointer(self, asked: int | None, chosen: int | None) -> None:
        """A run that goes on from an older checkpoint than it thinks must say so."""
        text, there = self._pointer_text(), os.path.lexists(self.root / POINTER)
        if asked is None and there and self._pointer() != chosen:
            warnings.warn(
                f"{self.root / POINTER} names {text[:40]!r}, of which there is no complete checkpoint. "
                f"Iteration {chosen} is loaded instead.",
                stacklevel=3,
            )

    def _nothing_text(self, iteration: int | None) -> str:
        complete = self.complete()
        for entry, number in reversed(self._matching(CHECKPOINT)):
            if iteration in (None, number) and (entry / CHECKSUM_NAME).exists():
                return f"{entry / MANIFEST_NAME} is missing: half of a checkpoint. {TRY}"
        if iteration is not None and complete:
            return (
                f"{self.root} holds no complete checkpoint of iteration {iteration}. Complete iterations: "
                f"{listed(complete)}."
            )
        hints = {
            "config.json": "It looks like a Hugging Face model",
            "latest": "It looks like a checkpoint of DeepSpeed",
            "iter_*/mp_rank_*": "It looks like a checkpoint in Megatron's older format, one file per rank",
        }
        for pattern, hint in hints.items():
            if next(self.root.glob(pattern), None):
                return (
                    f"{self.root} holds no distributed checkpoint. {hint}: scripts/convert_checkpoint.py tells "
                    "what it can convert."
                )
        if os.path.lexists(self.root / POINTER):
            return (
                f"{self.root / POINTER} names {self._pointer_text()[:40]!r}, and {self.root} holds no "
                "complete checkpoint, of that iteration or another. Bring it back from a copy; or, to begin "
                "anew, save to another directory, or remove the pointer."
            )
        return (
            f"{self.root} holds no complete checkpoint (iter_0000010 or the like with a {MANIFEST_NAME}). "
            f"Complete iterations: {listed(complete)}. Give the directory that a run saved to."
        )


@contextlib.contextmanager
def _resisting() -> Iterator[None]:
    """The newest checkpoint is safe; that old ones resist must not end a training run."""
    try:
        yield
    except (OSError, HelixError) as error:
        warnings.warn(f"an old checkpoint could not be removed: {error}", stacklevel=3)


def _check_keep(keep: int) -> None:
    if keep < 1:
        raise HelixError(
            f"cannot keep {keep} checkpoints: the newest one always stays.",
            remedy=with_settings("Give 1 or more, or leave <keep> out."),
        )


def _check_sizes(staging: Path) -> None:
    """A manifest of other files would only be noticed when the checkpoint is needed."""
    for name, entry in read_manifest(staging).files.items():
        path = staging / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise HelixError(
                f"the checkpoint in {staging} was not written as its manifest says: {name} {found} instead of "
                f"having {entry.size}. Something else writes to this directory, or the disk fails."
            )


def _make_durable_directory(directory: Path) -> None:
    created = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in created:
        with contextlib.suppress(PermissionError):  # of a parent that may be passed but not read
            sync_directory(path.parent)


def _set_aside(directory: Path) -> None:
    """Free the name of a checkpoint that something else, not complete and not ours to delete, lies under."""
    if not os.path.lexists(directory):
        return
    aside = directory.with_name(f"{directory.name}.incomplete-{secrets.token_hex(4)}")
    os.rename(directory, aside)
    warnings.warn(f"{directory} was no complete checkpoint. It is now {aside}.", stacklevel=4)
