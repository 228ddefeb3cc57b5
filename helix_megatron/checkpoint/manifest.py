"""The manifest of a checkpoint: what it is, and the size and BLAKE3 of every file.

A checkpoint directory is complete when its manifest, `helix.json`, lies in it: the manifest is renamed into
place after everything else is on the disk. Beside it lies `helix.json.sha256`, the manifest's own hash in the
format of the `sha256sum` command: it shows a manifest that was damaged, and one that was lost.

Format 1 had the SHA-256 of every file, which took longer than everything else that a conversion does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from helix_megatron.checkpoint.durable import sync_directory, write_durably
from helix_megatron.checkpoint.foreign import MOST_JSON, MOST_TEXT, parse_json, read_bytes
from helix_megatron.errors import HelixError, listed

MANIFEST_NAME = "helix.json"
CHECKSUM_NAME = "helix.json.sha256"
FORMAT = 2
HASHES: dict[str, Callable[[], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
KINDS = ("canonical", "ranks", "huggingface")
MOST_SEGMENTS = 10**5  # dimensions of a head, of which a segment has at least one
ATTENTIONS = ("exact", "segment-local")
CHUNK_BYTES = 1 << 20  # fits into a core's cache, so that hashing does not wait for memory
# Files that a reader takes up because they lie there. Others (notes, logs) may be added to a checkpoint.
READ_SUFFIXES = (".metadata", ".distcp", ".pt", ".pth", ".bin", ".pkl", ".safetensors", ".json")
TRY = "Load another iteration, or copy this checkpoint again from where it came."


@dataclass(frozen=True)
class FileEntry:
    """One file: its size in bytes, and its hash in hexadecimal by one of `HASHES`."""

    size: int
    hash: str
    algorithm: str = "blake3"

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, self.algorithm: self.hash}

    @classmethod
    def from_json(cls, entry: Any) -> FileEntry | None:
        """The inverse of `to_json`; None of anything else."""
        if not isinstance(entry, dict) or len(entry) != 2:
            return None
        algorithm = next((name for name in HASHES if name in entry), "")
        size, text = entry.get("size"), entry.get(algorithm)
        if type(size) is not int or size < 0 or not isinstance(text, str):
            return None
        return cls(size, text, algorithm) if re.fullmatch(r"[0-9a-f]{64}", text) else None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint directory holds.

    Attributes:
        kind: `canonical` (megatron-core's distributed checkpoint), `ranks` (one file per rank) or
            `huggingface`.
        model: model flags, as the training script names their destinations.
        attention: `exact`, or `segment-local`, whose weights are of another architecture.
        segments: into how many segments a head is cut when `segment-local`; 1 when `exact`.
        iteration: of training; None for weights alone.
        layout: under which it was written: tp, pp, dp, ep, m, n, …
        versions: of the packages that wrote it.
        files: relative POSIX path → size and hash, of every file except the manifest and its hash.
        extra: anything else a writer wants to find again. Like `model` and `layout`, JSON values.
    """

    kind: str
    model: dict[str, Any]
    attention: str = "exact"
    segments: int = 1
    iteration: int | None = None
    layout: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Indented JSON. `from_json` gives an equal manifest, except that tuples become lists.

        Raises:
            HelixError: a value that no manifest may have.
        """
        files = {name: entry.to_json() for name, entry in sorted(self.files.items())}
        content = {"format": FORMAT, **vars(self), "files": files}
        _checked(content, MANIFEST_NAME)
        try:
            return json.dumps(content, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise HelixError(f"the manifest cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str, *, name: str = MANIFEST_NAME) -> Manifest:
        """Read a manifest; `name` is the file that errors speak of.

        Raises:
            HelixError: no JSON, another format version, a missing, unknown, duplicate or mistyped field, a
                file outside the directory. The text names file and field.
        """
        content = parse_json(text.encode(), name, unique=True, remedy=TRY)
        files = _checked(content, name)
        fields = {key: value for key, value in content.items() if key != "format"}
        return cls(**{**fields, "files": files})


# Field → type in JSON. All are required: a file without one was not written by this package.
FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int,
    "kind": str,
    "model": dict,
    "attention": str,
    "segments": int,
    "iteration": (int, type(None)),
    "layout": dict,
    "versions": dict,
    "files": dict,
    "extra": dict,
}


def _checked(content: Any, name: str) -> dict[str, FileEntry]:
    """The files of a manifest whose fields are as they must be."""
    if not isinstance(content, dict):
        raise HelixError(f"{name} holds a {type(content).__name__}, not a manifest. {TRY}")
    version = content.get("format")
    if version not in range(1, FORMAT + 1):
        raise HelixError(
            f"{name}: format is {version!r}. This version of helix_megatron reads formats 1 to {FORMAT}: "
            "a newer one may read this checkpoint."
        )
    for key in content.keys() | FIELDS.keys():
        if key not in FIELDS:
            raise HelixError(f"{name}: unknown field {key!r}. Fields are {listed(sorted(FIELDS))}.")
        if key not in content:
            raise HelixError(f"{name}: the field {key!r} is missing. {TRY}")
        value = content[key]
        if not isinstance(value, FIELDS[key]) or isinstance(value, bool):
            raise HelixError(f"{name}: {key} is {value!r:.80}, of the wrong type. {TRY}")
    for key, valid in (("kind", KINDS), ("attention", ATTENTIONS)):
        if content[key] not in valid:
            raise HelixError(
                f"{name}: {key} is {content[key]!r}. Valid values: {', '.join(valid)}."
            )
    _check_segments(content, name)
    iteration = content["iteration"]
    if iteration is not None and not 0 <= iteration < 2**63:
        raise HelixError(
            f"{name}: iteration is {iteration}. It must not be negative, nor beyond 2⁶³."
        )
    for key, value in content["versions"].items():
        if not isinstance(value, str):
            raise HelixError(f"{name}: versions.{key} is {value!r:.80}, not a text. {TRY}")
    return {path: _entry(path, entry, name) for path, entry in content["files"].items()}


def _check_segments(content: dict[str, Any], name: str) -> None:
    segments, exact = content["segments"], content["attention"] == "exact"
    if segments < 1 or (exact and segments != 1):
        raise HelixError(
            f"{name}: segments is {segments}. It is 1 for exact attention, positive otherwise."
        )
    for key in ("num_attention_heads", "num_query_groups"):
        heads = content["model"].get(key)
        if type(heads) is int and heads % segments:
            raise HelixError(
                f"{name}: segments is {segments}, and {key} is {heads}. The heads of segment-local attention "
                "are a multiple of the segments."
            )
    if segments > MOST_SEGMENTS:
        raise HelixError(f"{name}: segments is {segments}. The most are {MOST_SEGMENTS:,}.")


def _entry(path: str, entry: Any, name: str) -> FileEntry:
    parts = PurePosixPath(path).parts
    plain = "/".join(parts) == path and "\\" not in path and "\0" not in path
    if not plain or not parts or ".." in parts or path.startswith("/"):
        raise HelixError(
            f"{name}: files names {path!r}. Files of a checkpoint have relative paths inside its directory."
        )
    if path in (MANIFEST_NAME, CHECKSUM_NAME):
        raise HelixError(f"{name}: files names {path!r}, the manifest itself.")
    found = FileEntry.from_json(entry)
    if found is None:
        raise HelixError(
            f"{name}: files[{path!r}] is {entry!r:.120}, not a size and a hash ({listed(HASHES)})."
        )
    return found


# ----------------------------------------------------------------------- write


def digest(path: Path | str) -> FileEntry:
    """Size and hash of a file whose content is on the disk when this returns."""
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        return _hash(file)


def write_manifest(directory: Path | str, manifest: Manifest) -> None:
    """Complete a checkpoint: put its manifest in place, atomically and durably.

    The files must be on the disk already (`digest` sees to it). A manifest that is there is taken away first:
    until the new one is in place the checkpoint is incomplete.

    Raises:
        HelixError: a value that no manifest may have.
        OSError: it cannot be written.
    """
    directory = Path(directory)
    content = manifest.to_json().encode()
    path = directory / MANIFEST_NAME
    if path.exists():
        path.unlink()
        sync_directory(directory)
    checksum = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n"
    write_durably(directory / CHECKSUM_NAME, checksum.encode())
    write_durably(path, content)


# ------------------------------------------------------------------------ read


def has_manifest(directory: Path | str) -> bool:
    """Whether this is a checkpoint with a manifest; without one, stock Megatron may have written it.

    Raises:
        HelixError: it had a manifest, which is gone.
    """
    directory = Path(directory)
    if (directory / MANIFEST_NAME).is_file():
        return True
    if (directory / CHECKSUM_NAME).exists():
        raise HelixError(f"{directory / MANIFEST_NAME} is missing: half of a checkpoint. {TRY}")
    return False


def read_manifest(directory: Path | str) -> Manifest:
    """The manifest of a checkpoint directory. The files that it names are not looked at: see `verify`."""
    path = Path(directory) / MANIFEST_NAME
    checksum_path = path.with_name(CHECKSUM_NAME)
    if not has_manifest(directory):
        raise HelixError(
            f"{path} is missing: {directory} is no checkpoint of helix_megatron, or an incomplete one. {TRY}"
        )
    content = read_bytes(path, MOST_JSON, TRY)
    checksum = read_bytes(checksum_path, MOST_TEXT, TRY)
    expected = f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_NAME}\n".encode()
    if checksum != expected:
        raise HelixError(
            f"{path} is damaged: its SHA-256 is not the one in {CHECKSUM_NAME}, or that file is. {TRY}"
        )
    try:
        return Manifest.from_json(content.decode(), name=str(path))
    except UnicodeDecodeError as error:
        raise HelixError(f"{path} is damaged: no valid UTF-8 ({error}). {TRY}") from error


def verify(
    directory: Path | str, *, workers: int = 4, only: Callable[[str], bool] | None = None
) -> Manifest:
    """Check a checkpoint against its manifest: nothing missing, nothing changed, nothing added.

    Files that no reader takes up (notes, logs, `.tmp…`) may have been added.

    Args:
        directory: of the checkpoint. Nothing is written to it.
        workers: threads that hash.
        only: of a relative path, whether to look into this file. Several processes share the work by it:
            they all look for missing and added files.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    present = set(file_names(directory))
    problems = {name: "is missing" for name in manifest.files.keys() - present}
    for name in present - manifest.files.keys():
        base = PurePosixPath(name).name
        if base.endswith(READ_SUFFIXES) and not base.startswith(".tmp"):
            problems[name] = (
                "is not in the manifest: it was added later, or belongs to another checkpoint"
            )
    chosen = sorted(name for name in manifest.files if name in present and (not only or only(name)))

    def check(name: str) -> str | None:
        return problem(directory / name, manifest.files[name])

    if not problems and chosen:
        with ThreadPoolExecutor(min(workers, len(chosen))) as pool:
            found = zip(chosen, pool.map(check, chosen), strict=True)
            problems = {name: text for name, text in found if text}
    if problems:
        first = min(problems)
        more = f" {len(problems) - 1} more files are damaged." if len(problems) > 1 else ""
        raise HelixError(f"{directory / first} {problems[first]}.{more} {TRY}")
    return manifest


def problem(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file, for people; None if it is as its entry says."""
    try:
        size = path.stat().st_size
        if size < entry.size:
            return f"is truncated: {size} of {entry.size} bytes"
        if size > entry.size:
            return f"has changed: {size} bytes instead of {entry.size}"
        with open(path, "rb", buffering=0) as file:
            actual = _hash(file, entry.algorithm)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if actual == entry else f"has changed: its {entry.algorithm} hash is another"


def _hash(file: Any, algorithm: str = "blake3") -> FileEntry:
    """Of an unbuffered file from its beginning; other threads run meanwhile."""
    hasher = HASHES[algorithm]()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    size = 0
    while count := file.readinto(buffer):
        hasher.update(view[:count])
        size += count
    return FileEntry(size, hasher.hexdigest(), algorithm)


def file_names(directory: Path) -> list[str]:
    """Relative POSIX paths of all files below, but those that the manifest consists of."""
    own = {MANIFEST_NAME, CHECKSUM_NAME}
    own |= {f".{name}.tmp" for name in own}  # left by a process that was killed
    names = []

    def stop(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(directory, onerror=stop):
        for base in [*folders, *files]:
            path = Path(folder, base)
            name = path.relative_to(directory).as_posix()
            if base in folders and not path.is_symlink():
                continue
            # A broken link, or one to itself, is reported as a file that cannot be read.
            if os.path.exists(path) and not os.path.isfile(path):
                raise HelixError(
                    f"{path} is neither a file nor a directory (a link to a directory, a pipe, …). A "
                    "checkpoint consists of files: replace it by what it stands for, or remove it."
                )
            if name not in own:
                names.append(name)
    return sorted(names)
