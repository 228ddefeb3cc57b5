"""Nothing half done, nothing lost, nothing damaged used: conversions that are killed, refused or fail."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import hashes, write_hugging_face
from torch.distributed.checkpoint.metadata import MetadataIndex

from helix_megatron.checkpoint import (
    canonical_files,
    canonical_io,
    huggingface_io,
    rank_io,
    verified,
)
from helix_megatron.checkpoint.command import main
from helix_megatron.checkpoint.convert import Options, RankOptions, convert
from helix_megatron.checkpoint.manifest import digest_directory, read_manifest, write_manifest
from helix_megatron.checkpoint.store import Store
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError

WRITERS = {
    "canonical": (canonical_files.CanonicalFile, "add"),
    "huggingface": (huggingface_io.SafetensorsFile, "add"),
    "ranks": (rank_io.StageFiles, "write"),
}
RANKS = RankOptions(tensor=2, pipeline=2, helix=HelixConfig(2))


def convert_and_die(source: Path, target: Path, kind: str, options: Options, number: int) -> bool:
    """Convert in another process that kills itself at the `number`-th tensor; whether it came to that."""
    child = os.fork()
    if child == 0:
        cls, method = WRITERS[kind]
        original = getattr(cls, method)
        calls = iter(range(number))

        def counted(*args: Any) -> Any:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(cls, method, counted)
        rank_io.SYNC_BYTES = 1
        from helix_megatron.checkpoint import targets

        targets.SYNC_BYTES = 1
        try:
            convert(source, target, kind, options, out=io.StringIO())
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", list(WRITERS))
def test_a_killed_conversion_leaves_nothing_and_is_resumed(tmp_path, kind):
    """Killed at several tensors: no target; the next run keeps finished files, and the result is the same."""
    source = write_hugging_face(tmp_path / "hf")
    options = Options(shard_size=None if kind == "ranks" else 20_000, ranks=RANKS)
    convert(source, tmp_path / "whole", kind, options, out=io.StringIO())
    expected = hashes(tmp_path / "whole")
    kills = 0
    for number in (0, 3, 9, 14, 30):
        target = tmp_path / f"target {number}"
        if not convert_and_die(source, target, kind, options, number):
            continue
        kills += 1
        assert not target.exists()
        staged = tmp_path / f".{target.name}.converting" / "content"
        journal = (staged.parent / "journal.jsonl").read_text()
        records = [json.loads(line) for line in journal.splitlines() if '"unit"' in line]
        done = [entry for entry in records if "files" in entry]
        names = [name for entry in done for name in entry["files"]]
        before = {name: (staged / name).stat().st_ino for name in names}
        said = io.StringIO()
        convert(source, target, kind, options, out=said)
        assert {name: (target / name).stat().st_ino for name in names} == before
        assert ("Resuming" in said.getvalue()) == bool(records)
        assert not staged.parent.exists()
        if kind == "ranks":  # torch.save gives every file a random identification
            for name in expected:
                if name.endswith(".pt"):
                    ours, theirs = (
                        torch.load(folder / name, weights_only=True)["module"]
                        for folder in (target, tmp_path / "whole")
                    )
                    assert all(v is None or v.equal(theirs[k]) for k, v in ours.items())
        else:
            pickled = {"release/.metadata", "release/common.pt"}
            same = {k: v for k, v in hashes(target).items() if k not in pickled}
            assert same == {k: v for k, v in expected.items() if k not in pickled}
    assert kills >= 4, "the conversion was not killed"


def test_another_source_or_setting_starts_afresh(tmp_path):
    """Files of another conversion must not end up in this one's result."""
    source = write_hugging_face(tmp_path / "hf")
    target = tmp_path / "target"
    options = Options(shard_size=20_000)
    for change in ("source", "setting", "--no-resume"):
        assert convert_and_die(source, target, "canonical", options, 12)
        if change == "source":
            for path in source.glob("*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
                os.utime(path, ns=(1, 1))
        else:
            options = Options(shard_size=20_000, resume=change != "--no-resume", dtype="bf16")
        said = io.StringIO()
        convert(source, target, "canonical", options, out=said)
        assert ("starts afresh" in said.getvalue()) == (change != "--no-resume")
        assert "Resuming" not in said.getvalue()
        convert(target, tmp_path / change, "huggingface", out=io.StringIO())
        (tmp_path / change).rename(tmp_path / f"seen {change}")
        target.rename(tmp_path / f"target {change}")


def test_a_staged_file_that_was_damaged_is_written_anew(tmp_path):
    """What an interrupted conversion left is checked against its hashes before it is kept."""
    source = write_hugging_face(tmp_path / "hf")
    options = Options(shard_size=20_000)
    convert(source, tmp_path / "whole", "huggingface", options, out=io.StringIO())
    assert convert_and_die(source, tmp_path / "target", "huggingface", options, 12)
    path = next((tmp_path / ".target.converting" / "content").glob("*00001*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    convert(source, tmp_path / "target", "huggingface", options, out=io.StringIO())
    assert hashes(tmp_path / "target") == hashes(tmp_path / "whole")


def test_two_conversions_to_one_target(tmp_path):
    """The second must not write into the first one's files."""
    from helix_megatron.checkpoint.staging import Staging

    source = write_hugging_face(tmp_path / "hf")
    staging = Staging(tmp_path / "target", {"a": 1})
    with pytest.raises(HelixError, match="another process is converting to"):
        convert(source, tmp_path / "target", "canonical", out=io.StringIO())
    staging.close()


# ---------------------------------------------------------------- damage and refusal


def test_every_damaged_file_is_found_before_a_tensor_is_used(tmp_path):
    """Each file of a canonical checkpoint flipped, truncated and removed in turn; the error names it."""
    source = write_hugging_face(tmp_path / "hf")
    convert(source, tmp_path / "store", "canonical", Options(shard_size=60_000), out=io.StringIO())
    release = tmp_path / "store" / "release"
    files = [path for path in sorted(release.rglob("*")) if path.is_file()]
    assert len(files) >= 10
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 0x10
        for damaged in (bytes(flipped), content[:-1], None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            with pytest.raises(HelixError) as error:
                convert(release, tmp_path / "back", "huggingface", out=io.StringIO())
            assert path.name.removesuffix(".sha256") in str(error.value)
            assert not (tmp_path / "back").exists()
        path.write_bytes(content)
    convert(release, tmp_path / "back", "huggingface", out=io.StringIO())


def test_files_of_no_tensor_are_verified_too(tmp_path):
    """Optimizer state lies in files that a conversion does not read: damage there tells of a bad copy."""
    source = write_hugging_face(tmp_path / "hf")
    convert(source, tmp_path / "store", "canonical", out=io.StringIO())
    release = tmp_path / "store" / "release"
    (release / "__9_0.distcp").write_bytes(b"optimizer")
    manifest = read_manifest(release)
    write_manifest(release, dataclasses.replace(manifest, files=digest_directory(release)))
    convert(release, tmp_path / "back", "huggingface", out=io.StringIO())
    (release / "__9_0.distcp").write_bytes(b"optimiser")
    with pytest.raises(HelixError, match=r"__9_0.distcp has changed"):
        convert(release, tmp_path / "again", "huggingface", out=io.StringIO())
    assert not (tmp_path / "again").exists()
    options = Options(verify_source=False)
    convert(release, tmp_path / "again", "huggingface", options, out=io.StringIO())


def test_a_tensor_is_read_only_after_its_file_is_verified(tmp_path, monkeypatch):
    """Verification runs in the background: reading must wait for it, file by file."""
    source = write_hugging_face(tmp_path / "hf")
    options = Options(shard_size=20_000)
    convert(source, tmp_path / "store", "canonical", options, out=io.StringIO())
    events = []
    mapped, check = canonical_io.CanonicalReader._mapped, verified.VerifiedFiles._check

    def checked(self: Any, name: str) -> None:
        time.sleep(0.05)
        check(self, name)
        events.append(name)

    def reading(self: Any, name: str) -> Any:
        value = mapped(self, name)
        key = self._keys[name]
        place = self._reader.storage_data[MetadataIndex(key, self._chunks(name).chunks[0].offsets)]
        assert place.relative_path in events, f"{name} was read before its file was verified"
        return value

    monkeypatch.setattr(verified.VerifiedFiles, "_check", checked)
    monkeypatch.setattr(canonical_io.CanonicalReader, "_mapped", reading)
    convert(tmp_path / "store", tmp_path / "back", "huggingface", out=io.StringIO())
    assert len(events) > 3


def test_a_target_that_exists_stays_as_it_is(tmp_path, monkeypatch):
    """Refused; with --overwrite replaced, but not by a conversion that fails."""
    source = write_hugging_face(tmp_path / "hf")
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("data")
    with pytest.raises(SystemExit):
        main([str(source), str(target), "--to", "canonical"])
    before = hashes(target)

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(canonical_files.CanonicalFile, "add", no_space)
        with pytest.raises(HelixError, match=r"cannot write to .*target.*no space is left"):
            convert(source, target, "canonical", Options(overwrite=True), out=io.StringIO())
    assert hashes(target) == before
    assert main([str(source), str(target), "--to", "canonical", "--overwrite"]) == 0
    assert Store(target).resolve().name == "release"
    assert not (target / "precious").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "target"}
    (tmp_path / "file").write_text("")
    with pytest.raises(HelixError, match="is a file"):
        convert(source, tmp_path / "file", "canonical", Options(overwrite=True))


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    """--overwrite moves the old target aside for a moment: the next conversion puts it back."""
    source = write_hugging_face(tmp_path / "hf")
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("data")
    rename = os.rename

    def stop(a: Any, b: Any) -> None:
        if Path(b) == target:
            raise KeyboardInterrupt
        rename(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, "canonical", Options(overwrite=True), out=io.StringIO())
    assert not target.exists()
    with pytest.raises(HelixError, match="target exists"):
        convert(source, target, "canonical", out=io.StringIO())
    assert (target / "precious").read_text() == "data"


def test_verify_finds_what_was_written_wrongly(tmp_path, monkeypatch):
    """A bit that changes on its way to the disk: hashes agree with the file, only a comparison tells."""
    source = write_hugging_face(tmp_path / "hf")
    original = canonical_files.CanonicalFile.add

    def corrupt(self: Any, tensor: torch.Tensor) -> Any:
        changed = tensor.clone()
        if tensor.shape[-2:] == (48 * 2, 32):
            changed.view(-1)[7] += 1e-3
        return original(self, changed)

    monkeypatch.setattr(canonical_files.CanonicalFile, "add", corrupt)
    with pytest.raises(HelixError, match=r"decoder.layers.0.mlp.linear_fc1.weight differs"):
        convert(source, tmp_path / "store", "canonical", Options(verify=True), out=io.StringIO())
    assert not (tmp_path / "store").exists()
    convert(source, tmp_path / "store", "canonical", Options(), out=io.StringIO())
