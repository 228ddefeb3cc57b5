"""Processes that die in the middle of file operations, for the tests of checkpoint stores.

    python tests/crashes.py TEMPLATE PLACE ITERATION CONTENT [KEEP]

runs `kill_everywhere` in a small process, which forks ten times faster than one with torch in it.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.durable import sync_directories
from helix_megatron.checkpoint.manifest import (
    FileEntry,
    Manifest,
    digest,
    file_names,
    verify,
    write_manifest,
)
from helix_megatron.checkpoint.store import POINTER, Store

OPERATIONS = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "open", "close")


def digests(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in a directory, as a manifest has them."""
    return {name: digest(directory / name) for name in file_names(directory)}


def save(root: Path, iteration: int, content: str, keep: int | None = None) -> None:
    """A checkpoint of two small files, as training writes one."""
    store = Store(root)
    staging = store.begin(iteration)
    (staging / "sub").mkdir()
    for name in ("weights.pt", "sub/more.pt"):
        with open(staging / name, "w") as file:
            file.write(f"{name} of {content}")
    files = digests(staging)
    sync_directories(staging)
    write_manifest(
        staging, Manifest("canonical", {"text": content}, iteration=iteration, files=files)
    )
    store.commit(iteration, keep=keep)


def found(root: Path) -> tuple[int, str] | None:
    """(iteration, content) of what a reader would load, verified; None for an empty store."""
    store = Store(root)
    if not store.complete():
        return None
    directory = store.resolve()
    manifest = verify(directory)
    content = manifest.model["text"]
    for name in ("weights.pt", "sub/more.pt"):
        assert (directory / name).read_text() == f"{name} of {content}"
    assert manifest.iteration is not None
    return manifest.iteration, content


def in_child(function: Callable[[], None]) -> int:
    """Run in a forked process. Returns its exit code, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, function: Callable[[], None]) -> bool:
    """Run in a child that is killed at its file operation number `step`; False if it had fewer.

    Even numbers are before an operation, odd ones after it.
    """

    def run() -> None:
        count = 0

        def hooked(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                for moment in ("before", "after"):
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    count += 1
                    if moment == "before":
                        result = original(*args, **kwargs)
                return result

            return call

        for name in OPERATIONS:
            setattr(os, name, hooked(getattr(os, name)))
        builtins.open = hooked(builtins.open)
        function()

    code = in_child(run)
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code == -signal.SIGKILL


def recorded(function: Callable[[], None]) -> list[tuple[str, str]]:
    """(operation, name of the path) of everything that a function does to files, in order."""
    steps: list[tuple[str, str]] = []
    originals = {name: getattr(os, name) for name in OPERATIONS}

    def hooked(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = args[-1] if name in ("replace", "rename") else args[0]
            if isinstance(target, int):
                target = os.readlink(f"/proc/self/fd/{target}")
            steps.append((name, str(target)))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in OPERATIONS:
            setattr(os, name, hooked(name))
        function()
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
    return steps


def kill_everywhere(
    template: Path, place: Path, iteration: int, content: str, keep: int | None
) -> list[tuple[int, str] | None]:
    """Kill the saving of a checkpoint into copies of a store, once at each moment.

    After each kill a reader looks; a second save is killed at a random moment and a reader looks again; a third
    one is not killed. Returns what the reader found after each first kill, in the order of the moments; the
    last is of a save that was not killed any more.
    """
    generator = random.Random(0)
    outcomes = []
    killed = True
    while killed:
        root = place / str(len(outcomes))
        shutil.copytree(template, root)
        killed = killed_at(len(outcomes), lambda root=root: save(root, iteration, content, keep))
        outcomes.append(found(root))
        assert outcomes[-1] in (found(template), (iteration, content)), outcomes
        second = generator.randrange(100)
        killed_at(second, lambda root=root: save(root, iteration, "newer", keep))
        assert found(root) in (outcomes[-1], (iteration, "newer")), (len(outcomes), second)
        save(root, iteration, "last", 1)
        assert found(root) == (iteration, "last")
        left = sorted(path.name for path in root.iterdir())
        assert left == [f"iter_{iteration:07d}", POINTER], left
        shutil.rmtree(root)
    return outcomes


if __name__ == "__main__":
    first, second, *rest = sys.argv[1:]
    given = int(rest[2]) if len(rest) > 2 else None
    print(json.dumps(kill_everywhere(Path(first), Path(second), int(rest[0]), rest[1], given)))
