"""Files that are compared with their hashes just before they are used, some ahead of their use.

A large checkpoint does not stay in memory between one pass that verifies and another that reads: so each file
is hashed shortly before its tensors are read, and comes from the disk once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from helix_megatron.checkpoint import manifest as manifests

WORKERS = 2
AHEAD = 4  # files


class VerifiedFiles:
    """Verifies files of a checkpoint in the background.

    Args:
        directory: of the checkpoint, with its manifest.
        names: of its files, in the order in which they will be used.
    """

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory, self._names = directory, list(names)
        self._places = {name: place for place, name in enumerate(self._names)}
        self._checks: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(WORKERS)

    def wait(self, name: str) -> None:
        """Return when a file has been found to be as the manifest says; at once for one not to be verified.

        Raises:
            HelixError: it is damaged or missing.
        """
        if name not in self._places:
            return
        place = self._places[name]
        self._begin([name, *self._names[place : place + 1 + AHEAD]])
        self._checks[name].result()

    def wait_for_all(self) -> None:
        """The same for all files, used or not."""
        self._begin(self._names)
        for check in self._checks.values():
            check.result()
        self._pool.shutdown()

    def cancel(self) -> None:
        """Stop: what has not begun does not matter any more."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._checks:
                self._checks[name] = self._pool.submit(self._check, name)

    def _check(self, name: str) -> None:
        manifests.verify(self._directory, only=name.__eq__)
