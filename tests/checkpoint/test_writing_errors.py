"""Disk full, read-only, no permission: a clear error, and the checkpoint before is intact.

The disks are real where mounting is permitted (root): a tmpfs of one megabyte.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from pathlib import Path

import pytest
import torch
from crashes import found, in_child, save
from safetensors.torch import save_file

from helix_megatron.checkpoint.durable import write_durably
from helix_megatron.checkpoint.store import POINTER, Store, writing_errors
from helix_megatron.errors import HelixError

INTACT = "Checkpoints that were complete before are intact."


def test_disk_full(small_disk):
    """The save fails, says where and how much is free, leaves nothing; a smaller one then succeeds."""
    root = small_disk / "store"
    save(root, 10, "old")
    store = Store(root)
    staging = store.begin(20)
    with pytest.raises(HelixError) as error, writing_errors(staging):
        (staging / "weights.pt").write_bytes(bytes(2_000_000))
    text = str(error.value)
    assert text.startswith(f"cannot write to {staging}")
    assert "no space is left: 0 bytes of 1.05 MB are free on the disk of" in text
    assert "keep fewer checkpoints" in text
    assert text.endswith(INTACT)
    assert found(root) == (10, "old")
    store.abort(20)
    assert found(root) == (10, "old")
    save(root, 20, "new")
    assert found(root) == (20, "new")


def test_disk_full_for_the_pointer(small_disk):
    """The last file of a save: the new checkpoint is there, the old one is still the one to load."""
    save(small_disk, 10, "old")
    pointer = small_disk / POINTER
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space left"), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OSError, match="No space left"):
        write_durably(pointer, b"20" * 5000)
    assert pointer.read_text() == "10"
    assert sorted(path.name for path in small_disk.iterdir()) == [
        "filler",
        "iter_0000010",
        POINTER,
    ]


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_disk_full_as_libraries_say_it(small_disk, library):
    """torch raises a RuntimeError that tells nothing, safetensors an exception of its own."""
    tensors = {"weight": torch.zeros(1_000_000)}
    with (
        pytest.raises(HelixError, match=r"no space is left: .* of 1\.05 MB"),
        writing_errors(small_disk),
    ):
        if library == "torch":
            torch.save(tensors, small_disk / "weights.pt")
        else:
            save_file(tensors, small_disk / "weights.safetensors")


def test_read_only(small_disk):
    """Loading works, a save left by a kill included; saving says what is wrong."""
    save(small_disk, 10, "old")
    os.rename(small_disk / "iter_0000010", small_disk / ".iter_0000010.replaced")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert found(small_disk) == (10, "old")
    for write in (
        lambda: Store(small_disk).begin(20),
        lambda: Store(small_disk / "new").begin(20),
        lambda: Store(small_disk).prune(1),
        lambda: Store(small_disk).check_writable(),
        lambda: Store(small_disk / "new" / "er").check_writable(),
    ):
        with pytest.raises(HelixError, match=r"cannot write to .*the file system is read-only"):
            write()
    assert found(small_disk) == (10, "old")


def test_no_permission(tmp_path):
    """As another user than root, whom permissions do not bind."""
    tmp_path.chmod(0o555)

    def as_nobody() -> None:
        if os.geteuid() == 0:
            os.chdir(tmp_path)
            os.setgroups([])
            os.setuid(65534)
        for write in (Store(".").begin, lambda _: Store(".").check_writable()):
            with pytest.raises(HelixError, match=r"permission denied\. Save to a directory of"):
                write(10)

    assert in_child(as_nobody) == 0
    tmp_path.chmod(0o755)


def test_file_size_limit(tmp_path):
    """`ulimit -f`, as batch systems set it."""
    save(tmp_path, 10, "old")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        staging = Store(tmp_path).begin(20)
        with (
            pytest.raises(HelixError, match=r"largest size allowed\. Raise the limit"),
            writing_errors(staging),
        ):
            (staging / "weights.pt").write_bytes(bytes(200_000))

    assert in_child(limited) == 0
    assert found(tmp_path) == (10, "old")


def test_a_file_in_the_way(tmp_path):
    """`--save` that names a file, or a directory below one."""
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        for write in (Store(root).begin, lambda _, root=root: Store(root).check_writable()):
            with pytest.raises(HelixError, match=r"a part of the path is a file, not a directory"):
                write(10)
    with pytest.raises(HelixError, match="the path is too long"):
        Store(tmp_path / ("x" * 300)).begin(10)
    Store(tmp_path / "not" / "yet").check_writable()
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space is left: .* are free on the disk of"),
        (errno.EDQUOT, "your quota on this disk is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "permission denied"),
        (errno.ENAMETOOLONG, "the path is too long"),
        (errno.ENOTDIR, "a part of the path is a file"),
        (errno.EFBIG, "largest size allowed"),
    ],
)
def test_every_known_error(tmp_path, code, message):
    """Injected, so that all texts are seen where disks cannot be mounted; the file is named, too."""
    inner = tmp_path / "missing" / "file"
    with pytest.raises(HelixError, match=message) as error, writing_errors(tmp_path / "missing"):
        raise OSError(code, os.strerror(code), str(inner))
    assert str(error.value).startswith(f"cannot write to {tmp_path / 'missing'} (at {inner}): ")
    assert str(error.value).endswith(INTACT)
    assert isinstance(error.value.__cause__, OSError)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "I/O error"),
        FileNotFoundError(errno.ENOENT, "gone"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("shapes differ"),
        HelixError("already said"),
    ],
)
def test_other_errors_pass(tmp_path, error):
    """What is not understood must not be explained; here the disk is not full."""
    with pytest.raises(type(error)) as raised, writing_errors(tmp_path):
        raise error
    assert raised.value is error


def test_the_pointer_cannot_be_written(tmp_path, monkeypatch):
    """The last step of a commit fails: the old checkpoint is the one to load, and saving goes on later."""
    save(tmp_path, 10, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("helix_megatron.checkpoint.store.write_durably", full)
    with pytest.raises(HelixError, match="no space is left"):
        save(tmp_path, 20, "new", keep=1)
    assert found(tmp_path) == (10, "old")
    assert Store(tmp_path).complete() == [10, 20]
    monkeypatch.undo()
    save(tmp_path, 20, "newer", keep=1)
    assert found(tmp_path) == (20, "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000020", POINTER]


def test_an_old_checkpoint_that_resists(tmp_path, monkeypatch):
    """A new checkpoint is safe: that an old one cannot be deleted is a warning, not the end of a run."""
    save(tmp_path, 10, "old")

    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.warns(UserWarning, match=r"an old checkpoint could not be removed: .*permission"):
        save(tmp_path, 20, "new", keep=1)
    assert found(tmp_path) == (20, "new")
    monkeypatch.undo()
    save(tmp_path, 30, "newer", keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000030", POINTER]
