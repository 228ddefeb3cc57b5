"""The manifest finds every damaged, missing or added file, and says so in words that help."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from blake3 import blake3
from crashes import digests
from waiting import printed_afresh

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    digest,
    read_manifest,
    verify,
    write_manifest,
)
from helix_megatron.errors import HelixError

FULL = Manifest(
    kind="canonical",
    model={"num_layers": 2, "hidden_size": 64, "rotary_percent": 0.5, "moe_layer_freq": [0, 1]},
    attention="segment-local",
    segments=4,
    iteration=10,
    layout={"tp": 4, "m": 2, "optimizer": None},
    versions={"torch": "2.13.0"},
    files={"a/b.pt": FileEntry(3, "0" * 64), ".metadata": FileEntry(0, "f" * 64, "sha256")},
    extra={"position": {"samples": 12}, "text": "Grüße"},
)
FILES = {
    ".metadata": b"metadata " * 40,
    "common.pt": b"common",
    "metadata.json": b"{}",
    "__0_0.distcp": bytes(range(256)) * 20,
    "huggingface/tokenizer.model": b"\x00" * 10,
    "empty.pt": b"",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "iter_0000010"
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    files = digests(directory)
    write_manifest(directory, Manifest(kind="canonical", model={}, iteration=10, files=files))
    return directory


def test_round_trip(tmp_path):
    """What is written is what is read, and the text is the same each time: it is hashed."""
    assert Manifest.from_json(FULL.to_json()) == FULL
    assert Manifest.from_json(FULL.to_json()).to_json() == FULL.to_json()
    minimal = Manifest(kind="ranks", model={})
    write_manifest(tmp_path, minimal)
    assert read_manifest(tmp_path) == minimal
    write_manifest(tmp_path, FULL)  # in the place of another
    assert read_manifest(tmp_path) == FULL
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST_NAME, CHECKSUM_NAME]


def test_the_checksum_is_that_of_a_common_tool(checkpoint):
    """Someone without this package can check a copy: `sha256sum -c helix.json.sha256`."""
    run = subprocess.run(
        ["sha256sum", "-c", CHECKSUM_NAME], cwd=checkpoint, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr


def changed(**fields):
    return json.dumps(json.loads(FULL.to_json()) | fields)


ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no valid JSON"),
        ("[1]", "holds a list, not a manifest"),
        ("{}", "format is None. This version of helix_megatron reads formats 1 to 2"),
        (changed(format=3), "format is 3. This version of helix_megatron reads formats 1 to 2"),
        (changed(format=True), "format"),
        (changed(colour="red"), "unknown field 'colour'"),
        (changed(kind="zarr"), "kind is 'zarr'. Valid values: canonical, ranks, huggingface"),
        (changed(attention="local"), "attention is 'local'. Valid values: exact, segment-local"),
        (changed(segments=0), "segments is 0"),
        (changed(attention="exact"), "segments is 4. It is 1 for exact attention"),
        (changed(segments=True), "segments is True, of the wrong type"),
        (changed(iteration=-1), "iteration is -1"),
        (changed(iteration="10"), "iteration is '10', of the wrong type"),
        (changed(model=[]), "model is [], of the wrong type"),
        (changed(versions={"torch": 2}), "versions.torch is 2, not a text"),
        (changed(files={"../x": ENTRY}), "files names '../x'"),
        (changed(files={"a/../../x": ENTRY}), "files names 'a/../../x'"),
        (changed(files={"/etc/passwd": ENTRY}), "files names '/etc/passwd'"),
        (changed(files={"": ENTRY}), "files names ''"),
        (changed(files={".": ENTRY}), "files names '.'"),
        (changed(files={"a//b": ENTRY}), "files names 'a//b'"),
        (changed(files={"./a": ENTRY}), "files names './a'"),
        (changed(files={"a/": ENTRY}), "files names 'a/'"),
        (changed(files={"a\\b": ENTRY}), "files names 'a\\\\b'"),
        (changed(files={"a\0b": ENTRY}), "files names 'a\\x00b'"),
        (changed(files={MANIFEST_NAME: ENTRY}), "the manifest itself"),
        (changed(files={"a": {"size": 1}}), "not a size and a hash"),
        (changed(files={"a": {**ENTRY, "mode": 1}}), "not a size and a hash"),
        (changed(files={"a": {**ENTRY, "size": -1}}), "not a size and a hash"),
        (changed(files={"a": {**ENTRY, "size": True}}), "not a size and a hash"),
        (changed(files={"a": {"size": 1, "md5": "0" * 64}}), "not a size and a hash"),
        (changed(files={"a": {**ENTRY, "sha256": "0" * 63}}), "not a size and a hash"),
        (changed(files={"a": {**ENTRY, "sha256": "G" * 64}}), "not a size and a hash"),
        (FULL.to_json().replace('"kind"', '"kind": "ranks", "kind"'), "'kind' is there twice"),
        (FULL.to_json()[:-20], "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(text, message):
    """A file from elsewhere must not send a reader to other directories, nor be half understood."""
    with pytest.raises(HelixError) as error:
        Manifest.from_json(text, name="dir/helix.json")
    assert message in str(error.value)
    assert "dir/helix.json" in str(error.value)


@pytest.mark.parametrize("name", list(json.loads(FULL.to_json())))
def test_every_field_is_required(name):
    """A missing field would otherwise become a default: exact attention, for one."""
    content = json.loads(FULL.to_json())
    del content[name]
    with pytest.raises(HelixError, match=name):
        Manifest.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "wrong", [{"kind": "zarr"}, {"model": {"x": float("nan")}}, {"model": {"x": object()}}]
)
def test_a_wrong_manifest_is_not_written(tmp_path, wrong):
    """Found when it is saved, not when it is needed; the one that is there stays."""
    write_manifest(tmp_path, FULL)
    with pytest.raises(HelixError):
        write_manifest(tmp_path, Manifest(**({"kind": "ranks", "model": {}} | wrong)))
    assert read_manifest(tmp_path) == FULL


def test_digest(tmp_path):
    """Against the hash of all bytes at once, at sizes around those of a chunk."""
    for size in (0, 1, manifests.CHUNK_BYTES, manifests.CHUNK_BYTES + 1):
        content = os.urandom(size)
        (tmp_path / "file").write_bytes(content)
        assert digest(tmp_path / "file") == FileEntry(size, blake3(content).hexdigest())


def test_manifests_with_sha_256_are_verified(checkpoint):
    """Format 1, which checkpoints of before have: it loads, and damage is found."""
    path = checkpoint / MANIFEST_NAME
    content = json.loads(path.read_text()) | {"format": 1}
    for name, data in FILES.items():
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content))
    checksum = f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {MANIFEST_NAME}\n"
    (checkpoint / CHECKSUM_NAME).write_text(checksum)
    verify(checkpoint)
    (checkpoint / "common.pt").write_bytes(b"COMMON")
    with pytest.raises(HelixError, match=r"common\.pt has changed: its sha256 hash is another"):
        verify(checkpoint)


def test_verify_accepts_what_was_written(checkpoint):
    """Every file is in the manifest, in any directory; notes and leftovers of editors may be added."""
    assert set(verify(checkpoint).files) == set(FILES)
    (checkpoint / "notes.txt").write_text("good one")
    (checkpoint / ".tmp-upload.distcp").write_text("")
    verify(checkpoint, workers=1)


@pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME, CHECKSUM_NAME])
def test_every_file_flipped_truncated_lengthened_removed(checkpoint, name):
    """All damage is found, the error names the file and the damage, and says what to try."""
    path = checkpoint / name
    good = path.read_bytes()
    manifest_itself = name in (MANIFEST_NAME, CHECKSUM_NAME)
    damages = {"removed": (None, "is missing"), "longer": (good + b"x", "has changed")}
    if good:
        damages["truncated"] = (good[:-1], f"is truncated: {len(good) - 1} of {len(good)} bytes")
        damages["emptied"] = (b"", f"is truncated: 0 of {len(good)} bytes")
    for position in {0, len(good) // 2, max(0, len(good) - 1)} if good else ():
        flipped = bytearray(good)
        flipped[position] ^= 1
        damages[f"flipped {position}"] = bytes(flipped), "has changed: its blake3 hash is another"
    for content, message in damages.values():
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(HelixError) as error:
            verify(checkpoint)
        text = str(error.value)
        assert name in text
        assert ("is damaged" if manifest_itself and content is not None else message) in text
        assert "Load another iteration, or copy this checkpoint again" in text
        path.write_bytes(good)
    verify(checkpoint)


@pytest.mark.parametrize("position", range(0, 1200, 97))
def test_any_byte_of_the_manifest_is_guarded(checkpoint, position):
    """A digit of the layout or the model is as important as a weight."""
    path = checkpoint / MANIFEST_NAME
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 4
    path.write_bytes(content)
    with pytest.raises(HelixError, match=r"helix\.json is damaged"):
        read_manifest(checkpoint)


def test_added_files_that_a_reader_would_take_up(checkpoint):
    """A file of another checkpoint, mixed in by a copy, would be read as part of this one."""
    for name in ("__7_0.distcp", "decoder/shard_0_1.pt", "x.safetensors", "__0.metadata"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"")
        with pytest.raises(HelixError, match=f"{name} is not in the manifest"):
            verify(checkpoint)
        with pytest.raises(HelixError, match=f"{name} is not in the manifest"):
            verify(checkpoint, only=lambda _: False)
        (checkpoint / name).unlink()
    verify(checkpoint)


def test_several_damaged_files(checkpoint):
    """One is named, the others are counted."""
    for name in (".metadata", "common.pt", "metadata.json"):
        (checkpoint / name).write_bytes(b"?")
    with pytest.raises(HelixError, match=r"\.metadata is truncated: .* 2 more files are damaged"):
        verify(checkpoint)


def test_only_some_files(checkpoint):
    """Ranks share the hashing; a file that no rank reads twice is still looked for by all."""
    (checkpoint / "common.pt").write_bytes(b"COMMON")
    verify(checkpoint, only=lambda name: name != "common.pt")
    with pytest.raises(HelixError, match=r"common\.pt has changed"):
        verify(checkpoint, only=lambda name: name == "common.pt")
    (checkpoint / "common.pt").unlink()
    with pytest.raises(HelixError, match=r"common\.pt is missing"):
        verify(checkpoint, only=lambda name: name != "common.pt")


def test_a_directory_that_is_no_checkpoint(tmp_path):
    """The usual mistake: a wrong path."""
    with pytest.raises(HelixError, match="is no checkpoint of helix_megatron, or an incomplete"):
        verify(tmp_path)
    with pytest.raises(HelixError, match="nothing-here"):
        verify(tmp_path / "nothing-here")
    assert not manifests.has_manifest(tmp_path)
    (tmp_path / CHECKSUM_NAME).touch()
    with pytest.raises(HelixError, match="is missing: half of a checkpoint"):
        manifests.has_manifest(tmp_path)


@pytest.mark.parametrize("kind", ["link to a directory", "pipe"])
def test_things_that_are_not_files(checkpoint, kind):
    """A link to a directory would hide files from the manifest; a pipe would hang the hashing."""
    path = checkpoint / "odd.pt"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(checkpoint / "huggingface")
    with pytest.raises(HelixError, match=r"odd\.pt is neither a file nor a directory"):
        verify(checkpoint)


def test_links_to_files_are_files(checkpoint, tmp_path):
    """Hugging Face's cache is made of them; a broken one is a missing file."""
    shutil.move(checkpoint / "common.pt", tmp_path / "elsewhere")
    (checkpoint / "common.pt").symlink_to(tmp_path / "elsewhere")
    verify(checkpoint)
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(HelixError, match=r"common\.pt cannot be read: No such file"):
        verify(checkpoint)


def test_manifest_and_store_need_no_torch():
    """A list of checkpoints must appear at once, and on machines without torch."""
    program = "import sys, helix_megatron.checkpoint.store; assert 'numpy' not in sys.modules"
    assert printed_afresh(program) == ["[]"]
