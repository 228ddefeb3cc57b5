"""Nothing half done, nothing lost, nothing damaged used: conversions that are killed, refused or fail."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from crashes import digests
from tiny_checkpoints import hashes, write_hugging_face

from helix_megatron.checkpoint import (
    canonical_files,
    canonical_io,
    huggingface_io,
    manifest,
    rank_io,
)
from helix_megatron.checkpoint.command import main
from helix_megatron.checkpoint.convert import Options, RankOptions, convert
from helix_megatron.checkpoint.manifest import read_manifest, write_manifest
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
        records = [line for line in journal.splitlines() if '"unit"' in line]
        names = [name for line in records for name in json.loads(line.rpartition(" ")[0])["files"]]
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


DAMAGES = {
    "a bit of a file": lambda root: flip(next(root.rglob("*00001*.safetensors"))),
    "a file that is cut": lambda root: os.truncate(next(root.rglob("*00001*.safetensors")), 100),
    "another file": lambda root: (root / "content" / "stray.json").write_text("{}"),
    "the journal": lambda root: flip(root / "journal.jsonl"),
    "a journal that is cut": lambda root: os.truncate(root / "journal.jsonl", 700),
    "a link to files of somebody else": lambda root: linked(root, root.parent / "precious"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def linked(root: Path, elsewhere: Path) -> None:
    shutil.rmtree(root / "content")
    (root / "content").symlink_to(elsewhere)


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_resumed_is_checked(tmp_path, damage):
    """An interrupted conversion's files and journal may have changed: what is not as it was is made anew."""
    source = write_hugging_face(tmp_path / "hf")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("data")
    options = Options(shard_size=20_000)
    convert(source, tmp_path / "whole", "huggingface", options, out=io.StringIO())
    assert convert_and_die(source, tmp_path / "target", "huggingface", options, 12)
    DAMAGES[damage](tmp_path / ".target.converting")
    convert(source, tmp_path / "target", "huggingface", options, out=io.StringIO())
    assert hashes(tmp_path / "target") == hashes(tmp_path / "whole")
    assert hashes(tmp_path / "precious").keys() == {"file"}


@pytest.mark.parametrize("kind", ["link", "folder"])
@pytest.mark.parametrize("name", [".target.converting", ".target.replaced"])
def test_what_others_have_put_beside_the_target_stays(tmp_path, name, kind):
    """The names of our working folders are no proof that we made what lies under them."""
    source = write_hugging_face(tmp_path / "hf")
    precious = tmp_path / ("elsewhere" if kind == "link" else name)
    precious.mkdir()
    (precious / "file").write_text("data")
    if kind == "link":
        (tmp_path / name).symlink_to(precious)
    with pytest.raises(HelixError, match=rf"{name} is in the way, and no conversion made it"):
        convert(source, tmp_path / "target", "canonical", out=io.StringIO())
    assert (precious / "file").read_text() == "data"


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


def test_an_index_does_not_lead_out_of_the_result(tmp_path):
    """A store from elsewhere says in which files a Hugging Face model was: it must not choose other folders."""
    source = write_hugging_face(tmp_path / "hf")
    convert(source, tmp_path / "store", "canonical", out=io.StringIO())
    path = tmp_path / "store" / "release" / "huggingface" / huggingface_io.INDEX
    for name in ("../../precious.safetensors", "/tmp/x.safetensors", "config.json"):
        content = json.loads(path.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], name)
        path.write_text(json.dumps(content))
        options = Options(verify_source=False)
        with pytest.raises(HelixError, match="weight_map is not a table of tensors and files"):
            convert(tmp_path / "store", tmp_path / "back", "huggingface", options)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "store"}


def test_files_of_no_tensor_are_verified_too(tmp_path):
    """Optimizer state lies in files that a conversion does not read: damage there tells of a bad copy."""
    source = write_hugging_face(tmp_path / "hf")
    convert(source, tmp_path / "store", "canonical", out=io.StringIO())
    release = tmp_path / "store" / "release"
    (release / "__9_0.distcp").write_bytes(b"optimizer")
    facts = read_manifest(release)
    write_manifest(release, dataclasses.replace(facts, files=digests(release)))
    convert(release, tmp_path / "back", "huggingface", out=io.StringIO())
    (release / "__9_0.distcp").write_bytes(b"optimiser")
    with pytest.raises(HelixError, match=r"__9_0.distcp has changed"):
        convert(release, tmp_path / "again", "huggingface", out=io.StringIO())
    assert not (tmp_path / "again").exists()
    options = Options(verify_source=False)
    convert(release, tmp_path / "again", "huggingface", options, out=io.StringIO())


def test_a_tensor_is_read_only_after_its_file_is_verified(tmp_path, monkeypatch):
    """Files are verified one by one, between reading: none may be mapped before its turn."""
    source = write_hugging_face(tmp_path / "hf")
    options = Options(shard_size=20_000)
    convert(source, tmp_path / "store", "canonical", options, out=io.StringIO())
    verified = []
    piece, problem = canonical_io.CanonicalReader._piece, manifest.problem

    def checked(path: Path, entry: Any) -> Any:
        verified.append(path.name)
        return problem(path, entry)

    def reading(self: Any, tensor: Any, chunk: Any) -> Any:
        value = piece(self, tensor, chunk)
        assert self._place(tensor, chunk).relative_path in verified, tensor.name
        return value

    monkeypatch.setattr(canonical_io, "problem", checked)
    monkeypatch.setattr(canonical_io.CanonicalReader, "_piece", reading)
    convert(tmp_path / "store", tmp_path / "back", "huggingface", out=io.StringIO())
    assert len(set(verified)) > 3
    assert len(set(verified)) == len(verified), "a file was hashed twice"


def test_a_target_that_exists_stays_as_it_is(tmp_path, monkeypatch):
    """Refused; with --overwrite replaced if we made all of it, but not by a conversion that fails."""
    source = write_hugging_face(tmp_path / "hf")
    target = tmp_path / "target"
    target.mkdir()
    for name in ("precious", "release/huggingface/notes.txt"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("data")
        for more in ([], ["--overwrite"]):
            with pytest.raises(SystemExit):
                main([str(source), str(target), "--to", "canonical", *more])
        assert (target / name).read_text() == "data"
        with pytest.raises(HelixError, match=f"holds {name.split('notes')[0][:7]}.*no conversion"):
            convert(source, target, "canonical", Options(overwrite=True), out=io.StringIO())
        (target / name).unlink()
        if not (target / "release").exists():
            target.rmdir()
            convert(source, target, "canonical", out=io.StringIO())
    before = hashes(target)

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(canonical_files.CanonicalFile, "add", no_space)
        with pytest.raises(HelixError, match=r"cannot write to .*target.*no space is left"):
            convert(source, target, "canonical", Options(overwrite=True), out=io.StringIO())
    assert hashes(target) == before
    assert main([str(source), str(target), "--to", "huggingface", "--overwrite"]) == 0
    assert hashes(target).keys() == hashes(source).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "target"}
    (tmp_path / "file").write_text("")
    with pytest.raises(HelixError, match="is a file"):
        convert(source, tmp_path / "file", "canonical", Options(overwrite=True))


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    """--overwrite moves the old target aside for a moment: the next conversion puts it back."""
    source = write_hugging_face(tmp_path / "hf")
    target = tmp_path / "target"
    convert(source, target, "canonical", out=io.StringIO())
    before = hashes(target)
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
    assert hashes(target) == before


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
