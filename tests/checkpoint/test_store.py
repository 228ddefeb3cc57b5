"""A store of checkpoints survives a kill at any moment, and tells a user what he can load."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crashes import digests, found, in_child, recorded, save
from tiers import sized
from waiting import wait_until

from helix_megatron.checkpoint.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    Manifest,
    write_manifest,
)
from helix_megatron.checkpoint.store import POINTER, Store, is_complete
from helix_megatron.errors import HelixError


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """Where syncing costs nothing: a kill leaves the same there, and the tests save a thousand times."""
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(prefix="helix-store-", dir=place) as directory:
        yield Path(directory)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def stock_checkpoint(root: Path, iteration: int) -> Path:
    """What the store looks for in a checkpoint of stock megatron-core."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    for name in ("metadata.json", "common.pt", ".metadata"):
        (directory / name).write_text("{}")
    return directory


def test_saves_follow_each_other(tmp_path):
    """Names and pointer are those of Megatron, so that its tools find the checkpoints."""
    root = tmp_path / "new" / "store"
    save(root, 10, "a")
    save(root, 20, "b")
    assert names(root) == ["iter_0000010", "iter_0000020", POINTER]
    assert (root / POINTER).read_text() == "20"
    store = Store(root)
    assert store.complete() == [10, 20]
    assert store.latest() == 20
    assert store.resolve() == root / "iter_0000020"
    assert store.resolve(10) == store.path(10) == root / "iter_0000010"
    save(root, 12_345_678, "c")
    assert Store(root).latest() == 12_345_678


def test_the_same_iteration_again(tmp_path):
    """A run that was set back to 10 saves 20 again: the new one counts, nothing else stays."""
    for content in "abc":
        save(tmp_path, 20, content)
        assert found(tmp_path) == (20, content)
    assert names(tmp_path) == ["iter_0000020", POINTER]


def test_keep(tmp_path):
    """The newest stay; also the one that the pointer names, after a run was set back."""
    for iteration in (1, 2, 3, 4):
        save(tmp_path, iteration, "a", keep=2)
    assert Store(tmp_path).complete() == [3, 4]
    save(tmp_path, 1, "b", keep=2)
    assert Store(tmp_path).complete() == [1, 3, 4]
    assert found(tmp_path) == (1, "b")
    Store(tmp_path).prune(1)
    assert Store(tmp_path).complete() == [1, 4]
    (tmp_path / POINTER).unlink()
    Store(tmp_path).prune(1)
    assert names(tmp_path) == ["iter_0000004"]
    for keep in (0, -1):
        with pytest.raises(HelixError, match=rf"cannot keep {keep} checkpoints: the newest"):
            Store(tmp_path).prune(keep)
        with pytest.raises(HelixError, match=rf"cannot keep {keep} checkpoints: the newest"):
            save(tmp_path, 5, "c", keep=keep)


def test_keep_leaves_what_is_not_ours(tmp_path):
    """Checkpoints of stock Megatron and other files are not this package's to delete."""
    stock_checkpoint(tmp_path, 1)
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "tensorboard").mkdir()
    for iteration in (3, 4, 5):
        save(tmp_path, iteration, "a", keep=1)
    assert names(tmp_path) == [
        "iter_0000001",
        "iter_0000002",
        "iter_0000005",
        POINTER,
        "tensorboard",
    ]


def test_something_else_under_the_name_is_set_aside(tmp_path):
    """Megatron's older format, say: neither deleted nor a reason to lose the new checkpoint."""
    older = tmp_path / "iter_0000010" / "mp_rank_00"
    older.mkdir(parents=True)
    (older / "model_optim_rng.pt").write_text("weights")
    with pytest.warns(UserWarning, match="was no complete checkpoint. It is now .*incomplete-"):
        save(tmp_path, 10, "a")
    assert found(tmp_path) == (10, "a")
    (aside,) = tmp_path.glob("iter_0000010.incomplete-*")
    assert (aside / "mp_rank_00" / "model_optim_rng.pt").read_text() == "weights"


def test_checkpoints_of_stock_megatron(tmp_path):
    """They have no manifest; one of ours that lost it must not pass for one of them."""
    directory = stock_checkpoint(tmp_path, 7)
    assert Store(tmp_path).complete() == [7]
    assert Store(tmp_path).resolve() == directory
    (directory / CHECKSUM_NAME).touch()
    assert not is_complete(directory)
    with pytest.raises(HelixError, match=r"iter_0000007/helix\.json is missing: half of a"):
        Store(tmp_path).resolve()
    save(tmp_path, 8, "a")
    with pytest.raises(HelixError, match=r"iter_0000007/helix\.json is missing: half of a"):
        Store(tmp_path).resolve(7)
    (tmp_path / "iter_0000008" / ".metadata").touch()
    (tmp_path / "iter_0000008" / "metadata.json").touch()
    (tmp_path / "iter_0000008" / MANIFEST_NAME).unlink()
    assert Store(tmp_path).complete() == []


def test_the_pointer_names_nothing_complete(tmp_path):
    """A run must not silently go on from an older checkpoint than its log says."""
    save(tmp_path, 10, "a")
    save(tmp_path, 20, "b")
    for text in ("30", "rubbish", "-1", "9" * 30, "release"):
        (tmp_path / POINTER).write_text(text)
        with pytest.warns(UserWarning, match=f"names '{text}', of which there is no complete"):
            assert Store(tmp_path).resolve() == tmp_path / "iter_0000020"
    (tmp_path / POINTER).write_text("10")  # set back by hand: that is what Megatron loads
    assert Store(tmp_path).latest() == 10
    (tmp_path / POINTER).write_bytes(b"\xff\xfe")
    with pytest.warns(UserWarning, match="Iteration 20 is loaded instead"):
        Store(tmp_path).resolve()


def test_release(tmp_path):
    """Megatron's name for weights without an iteration, as its converters write them."""
    stock_checkpoint(tmp_path, 1).rename(tmp_path / "release")
    (tmp_path / POINTER).write_text("release")
    assert Store(tmp_path).resolve() == tmp_path / "release"


def test_the_root_is_itself_a_checkpoint(tmp_path):
    """Users give the directory that they see: DIR, DIR/iter_0000010 or a converted model."""
    save(tmp_path, 10, "a")
    inside = tmp_path / "iter_0000010"
    assert Store(inside).resolve() == Store(inside).resolve(10) == inside
    with pytest.raises(HelixError, match="holds no complete checkpoint"):
        Store(inside).resolve(20)
    bare = tmp_path / "converted"
    shutil.copytree(inside, bare)
    assert Store(bare).resolve() == bare
    (bare / MANIFEST_NAME).unlink()
    with pytest.raises(HelixError, match="is missing: half of a checkpoint"):
        Store(bare).resolve()


def test_nothing_to_load(tmp_path):
    """Each wrong path has its own advice."""
    with pytest.raises(HelixError, match=r"nowhere does not exist\. Give the directory that a run"):
        Store(tmp_path / "nowhere").resolve()
    (tmp_path / "file").touch()
    with pytest.raises(HelixError, match=r"file is a file\. Give the directory"):
        Store(tmp_path / "file").resolve()
    with pytest.raises(HelixError, match=r"no complete checkpoint .* Complete iterations: none"):
        Store(tmp_path).resolve()
    save(tmp_path, 10, "a")
    save(tmp_path, 20, "a")
    with pytest.raises(HelixError, match=r"of iteration 15. Complete iterations: 10, 20\."):
        Store(tmp_path).resolve(15)
    hints = {
        "config.json": "Hugging Face",
        "latest": "DeepSpeed",
        "iter_0000005/mp_rank_00/model.pt": "older format",
    }
    for number, (path, hint) in enumerate(hints.items()):
        root = tmp_path / f"other{number}"
        (root / path).parent.mkdir(parents=True)
        (root / path).touch()
        with pytest.raises(HelixError, match=rf"{hint}.*scripts/convert_checkpoint\.py"):
            Store(root).resolve()


def test_a_commit_without_what_it_says(tmp_path):
    """A manifest that disagrees with the files is an error now, while the old checkpoint is there."""
    save(tmp_path, 10, "a")
    store = Store(tmp_path)
    staging = store.begin(10)
    with pytest.raises(HelixError, match=r"helix\.json is missing"):
        store.commit(10)
    (staging / "weights.pt").write_text("four")
    files = digests(staging)
    write_manifest(staging, Manifest("canonical", {}, files=files))
    (staging / "weights.pt").write_text("fours")
    with pytest.raises(HelixError, match=r"weights\.pt has 5 bytes instead of having 4"):
        store.commit(10)
    (staging / "weights.pt").unlink()
    with pytest.raises(HelixError, match=r"weights\.pt is missing instead of having 4"):
        store.commit(10)
    store.abort(10)
    assert found(tmp_path) == (10, "a")
    assert names(tmp_path) == ["iter_0000010", POINTER]
    with pytest.raises(HelixError, match="iteration is -1"):
        store.begin(-1)


def test_abort(tmp_path):
    """A failed save leaves nothing, and the next one is not disturbed."""
    store = Store(tmp_path)
    (store.begin(10) / "file").touch()
    store.abort(10)
    store.abort(10)
    assert names(tmp_path) == []
    first = store.begin(10)
    second = store.begin(10)
    assert not first.exists()
    assert list(second.iterdir()) == []


def test_a_live_save_is_not_swept_away(tmp_path):
    """Another process (a converter) that shares the directory must not delete what is being written."""
    writer = Store(tmp_path)
    staging = writer.begin(10)
    other = Store(tmp_path)
    other.prune(1)
    other.begin(10)
    save(tmp_path, 20, "b", keep=1)
    assert staging.is_dir()
    write_manifest(staging, Manifest("canonical", {}, files={}))
    assert writer.commit(10) == tmp_path / "iter_0000010"


# ------------------------------------------------------------------------ kills

SCENARIOS = {
    "first": ([], (10, "new", None)),
    "next": ([(10, "old", None)], (20, "new", None)),
    "again": ([(10, "old", None)], (10, "new", None)),
    "keep": ([(10, "older", None), (20, "old", None)], (30, "new", 1)),
    "again, keep": ([(10, "older", None), (20, "old", None)], (20, "new", 1)),
}


IN_FULL_TIER = {"next", "again"}  # what they do is a part of the two that keep


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[pytest.mark.full("checkpoints")] * (name in IN_FULL_TIER))
        for name in SCENARIOS
    ],
)
def test_killed_at_every_file_operation(memory_path, scenario):
    """SIGKILL before and after each operation: a reader finds the old or the new, then saving goes on.

    A second kill falls into the first save after it, at some operation.
    """
    earlier, (iteration, content, keep) = SCENARIOS[scenario]
    template = memory_path / "template"
    template.mkdir()
    for save_earlier in earlier:
        save(template, *save_earlier)
    old = found(template)
    tests = Path(__file__).parents[1]
    arguments = [template, memory_path, iteration, content, *([] if keep is None else [keep])]
    run = subprocess.run(
        [sys.executable, tests / "crashes.py", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcomes = [outcome and tuple(outcome) for outcome in json.loads(run.stdout)]
    assert len(outcomes) > 80  # the operations were seen
    switch = outcomes.index((iteration, "new"))
    assert outcomes == [old] * switch + [(iteration, "new")] * (len(outcomes) - switch)
    assert 40 < switch < len(outcomes) - 2


def test_killed_while_there_is_only_the_replaced_one(tmp_path):
    """The one moment at which the name is free; read from a place that cannot be written to."""
    save(tmp_path, 10, "old")
    os.rename(tmp_path / "iter_0000010", tmp_path / ".iter_0000010.replaced")
    before = names(tmp_path)
    assert Store(tmp_path).complete() == [10]
    assert Store(tmp_path).latest() == 10
    assert Store(tmp_path).resolve(10) == tmp_path / ".iter_0000010.replaced"
    assert found(tmp_path) == (10, "old")
    assert names(tmp_path) == before
    Store(tmp_path).begin(20)
    assert found(tmp_path) == (10, "old")
    assert Store(tmp_path).resolve() == tmp_path / "iter_0000010"


def saved_since(pointer: Path, written: int) -> bool:
    return pointer.stat().st_mtime_ns != written


def test_killed_at_random_moments(memory_path):
    """The same without knowing where the operations are: no kill loses a checkpoint."""
    save(memory_path, 1, "first")
    generator = random.Random(1)
    for trial in range(sized("checkpoints", full=30, quick=8)):
        start = found(memory_path)
        assert start is not None
        child = os.fork()
        if child == 0:
            iteration = start[0]
            while True:
                save(memory_path, iteration, f"trial {trial}", keep=2)
                iteration += generator.choice((0, 1))
        pointer = memory_path / POINTER
        written = pointer.stat().st_mtime_ns
        wait_until(functools.partial(saved_since, pointer, written), "the child has saved")
        time.sleep(generator.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        after = found(memory_path)
        assert after is not None
        assert after[0] >= start[0]
        assert after[1] == f"trial {trial}"


def test_everything_is_on_the_disk_before_what_depends_on_it(tmp_path):
    """A power failure loses what was not synced, in any order; a kill does not show that."""
    save(tmp_path, 10, "old")
    steps = recorded(lambda: save(tmp_path, 10, "new", keep=1))
    final = str(tmp_path / "iter_0000010")
    root = str(tmp_path)

    def position(operation: str, end: str, last: bool = False) -> int:
        positions = [
            i for i, (name, path) in enumerate(steps) if name == operation and path.endswith(end)
        ]
        assert positions, (operation, end, steps)
        return positions[-1 if last else 0]

    staging = next(path for name, path in steps if name == "mkdir" and ".saving-" in path)
    manifest = position("replace", MANIFEST_NAME)
    for name in ("weights.pt", "sub/more.pt", "sub"):
        assert position("fsync", f"{staging}/{name}") < manifest
    assert position("fsync", f".{MANIFEST_NAME}.tmp") < manifest
    aside = position("rename", ".replaced")
    moved = position("rename", final)
    pointer = position("replace", POINTER)
    assert manifest < position("fsync", staging, last=True) < aside < moved < pointer
    synced = [i for i, step in enumerate(steps) if step == ("fsync", root)]
    assert any(aside < i < moved for i in synced)
    assert any(moved < i < pointer for i in synced)
    gone = max(
        i for i, (name, path) in enumerate(steps) if name == "rename" and ".removing-" in path
    )
    assert any(pointer < i < gone for i in synced)
    deleted = [i for i, (name, _) in enumerate(steps) if name in ("unlink", "rmdir")]
    assert any(gone < i < min(deleted) for i in synced)


def test_the_child_helpers_see_failures():
    """The kill tests rest on them."""
    assert in_child(lambda: None) == 0
    assert in_child(lambda: os._exit(3)) == 3


def test_a_directory_is_prepared_before_there_is_something_to_save(tmp_path):
    """What stands against saving must show at the start of a run; looking alone makes nothing."""
    store = Store(tmp_path / "a" / "b")
    store.check_writable()
    assert not (tmp_path / "a").exists()
    store.prepare()
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for check in (Store(tmp_path / "file").check_writable, Store(tmp_path / "file" / "x").prepare):
        with pytest.raises(HelixError, match="a part of the path is a file, not a directory"):
            check()
    with pytest.raises(HelixError, match=r"/proc/x cannot be made\. Save to a directory of"):
        Store("/proc/x").prepare()


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_what_is_not_ours_does_not_stop_a_save(tmp_path, make):
    """What only has a leftover's name stays: removing a pipe as a directory would wait for ever."""
    save(tmp_path, 10, "a")
    foreign = tmp_path / ".iter_0000020.saving-ab"
    make(foreign)
    make(tmp_path / "iter_0000010" / "notes")
    save(tmp_path, 20, "b", keep=1)
    assert Store(tmp_path).complete() == [20]
    assert os.path.lexists(foreign)
