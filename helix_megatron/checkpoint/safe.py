"""Read the pickles of a checkpoint without executing what is in them.

A distributed checkpoint holds three kinds of pickles, and stock readers trust all of them: `.metadata` (plain
pickle), objects such as random states inside the `.distcp` files (`torch.load(weights_only=False)`), and `.pt`
files. Tensors in `.distcp` files torch reads safely by itself. `inspect` reads all pickles here, before a stock
reader does, and refuses what it does not know.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import sys
from collections.abc import Iterator
from enum import EnumMeta
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from helix_megatron.checkpoint.foreign import check_files, read_bytes, read_json
from helix_megatron.checkpoint.manifest import file_names
from helix_megatron.checkpoint.torch_files import DAMAGED, TRUST, load_pt
from helix_megatron.errors import HelixError

__all__ = ["inspect", "load_common", "load_metadata", "load_pt"]

METADATA_NAME = ".metadata"
MOST_METADATA = 1 << 33  # bytes
COMMON_NAME = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
LAYOUTS = {"torch.strided": torch.strided, "torch.sparse_coo": torch.sparse_coo}
ALLOWED = {
    "torch.distributed.checkpoint.metadata": (
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    ),
    # megatron-core adds the plans of all ranks.
    "torch.distributed.checkpoint.planner": (
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset"),
}
PATHS = ("PosixPath", "PurePosixPath")


class _Unpickler(pickle.Unpickler):
    """Knows torch's metadata classes and nothing else."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        # A pickle can set attributes of what it can name. Class or enumeration member → its attributes before.
        self._before: dict[Any, dict[str, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return LAYOUTS.__getitem__
        if module in ("pathlib", "pathlib._local") and name in PATHS:
            return self._guarded(pathlib.PurePosixPath)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in ALLOWED.get(module, ()):
            return self._guarded(super().find_class(module, name))
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"the persistent object {pid!r:.80}")

    def load(self) -> Any:
        try:
            value = super().load()
        finally:
            changed = self._restore()
        if changed:
            raise _Refused(f"a change of {changed}")
        return value

    def _guarded(self, found: Any) -> Any:
        members: list[Any] = list(found) if isinstance(found, EnumMeta) else []
        for item in (found, *members):
            self._before.setdefault(item, dict(vars(item)))
        return found

    def _restore(self) -> str | None:
        """Undo changes of classes; the name of one that was changed."""
        changed = None
        for item, before in self._before.items():
            now = dict(vars(item))
            for name in now.keys() | before.keys():
                if now.get(name, _ABSENT) is before.get(name, _ABSENT):
                    continue
                changed = f"{getattr(item, '__name__', item)}.{name}"
                if name in before:
                    setattr(item, name, before[name])
                else:
                    delattr(item, name)
        return changed


class _Refused(Exception):
    """What a pickle asks for and does not get."""


_ABSENT = object()


def _unpickled(content: bytes, name: str) -> Any:
    """A pickle of torch's metadata and plain values. Raises HelixError that names the file."""
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except _Refused as error:
        raise HelixError(
            f"{name} is refused: it asks for {error}, which a checkpoint needs not and which could execute "
            "code.",
            remedy=TRUST,
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise HelixError(
            f"{name} is damaged: {type(error).__name__} when it is read ({str(error)[:200]}). {DAMAGED}"
        ) from error


def load_metadata(path: Path | str, *, trust: bool = False) -> Any:
    """The `.metadata` of a distributed checkpoint, as `pickle.load` gives it, without executing anything.

    Args:
        trust: read it with pickle itself.

    Raises:
        HelixError: names the file and what it asks for that is not allowed, or says that it is damaged.
    """
    content = read_bytes(Path(path), MOST_METADATA, DAMAGED)
    if trust:
        return pickle.loads(content)
    metadata = _unpickled(content, str(path))
    try:
        problem = next(_metadata_problems(metadata), None)
    except Exception as error:  # an attribute that is missing, a class that cannot be printed
        problem = f"{type(error).__name__} ({error})"
    if problem:
        raise HelixError(f"{path} is damaged or forged: {problem}. {DAMAGED}")
    return metadata


def _metadata_problems(metadata: Any) -> Iterator[str]:
    """What readers rely on and a forged file may not give; above all, paths that leave the directory."""
    if not isinstance(metadata, Metadata):
        yield f"it holds {type(metadata).__name__}, not the metadata of a distributed checkpoint"
        return
    tensors, stored = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        yield "its tables are missing"
        return
    for key, entry in tensors.items():
        shaped = isinstance(entry, TensorStorageMetadata) and isinstance(entry.size, torch.Size)
        if not isinstance(key, str) or not (shaped or isinstance(entry, BytesStorageMetadata)):
            yield f"{key!r:.120} is neither a tensor with a shape nor an object"
        elif isinstance(entry, TensorStorageMetadata) and not _is_whole(entry):
            yield f"{key!r:.120} has no dtype, or pieces that do not lie in it"
    for index, place in stored.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            yield f"{index!r:.120} has no place in a file"
            continue
        path = getattr(place, "relative_path", None)
        numbers = getattr(place, "offset", None), getattr(place, "length", None)
        if not isinstance(path, str) or path.startswith("/") or ".." in PurePosixPath(path).parts:
            yield f"{index.fqn} lies in {path!r:.120}, outside the checkpoint"
        elif not all(type(number) is int and number >= 0 for number in numbers):
            yield f"{index.fqn} has the offset and length {numbers}"


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether a tensor has a dtype, and pieces within its shape."""
    if not isinstance(entry.properties.dtype, torch.dtype) or not isinstance(entry.chunks, list):
        return False
    for chunk in entry.chunks:
        if not isinstance(chunk.offsets, torch.Size) or not isinstance(chunk.sizes, torch.Size):
            return False
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size):
            return False
        places = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        if any(min(start, size) < 0 or start + size > most for start, size, most in places):
            return False
    return True


def load_common(directory: Path, *, trust: bool = False) -> dict[str, Any]:
    """What a distributed checkpoint holds beside tensors: arguments, iteration and the like.

    megatron-core keeps it in `common.pt`, and from 0.19 on as an object in one of the `.distcp` files.

    Raises:
        HelixError: it is missing, damaged, or asks for what is not allowed.
    """
    if (directory / COMMON_NAME).exists() or not (directory / METADATA_NAME).exists():
        return load_pt(directory / COMMON_NAME, trust=trust)
    metadata = load_metadata(directory / METADATA_NAME, trust=trust)
    for _, place, content in _objects(directory, metadata, only=COMMON_KEY):
        value = load_pt(content, name=place, trust=trust)
        return value[0] if isinstance(value, list) else value
    raise HelixError(f"{directory} has neither {COMMON_NAME} nor {COMMON_KEY}. {DAMAGED}")


def inspect(directory: Path | str, *, trust: bool = False) -> None:
    """Read every pickle of a checkpoint, so that stock readers may read it next.

    Reads `.metadata`, all `.pt` files at any depth, and all objects in `.distcp` files, but no tensor. One
    process does it for all.

    Args:
        trust: do nothing: the user vouches for it.

    Raises:
        HelixError: names the file and what it asks for that is not allowed, or says that it is damaged.
    """
    directory = Path(directory)
    if trust:
        return
    names = file_names(directory)
    _check_backend(directory / "metadata.json")
    if METADATA_NAME not in names and any(
        name == "metadata.json" or name.endswith(".distcp") for name in names
    ):
        raise HelixError(f"{directory / METADATA_NAME} is missing. {DAMAGED}")
    for name in names:
        path = directory / name
        if name.endswith(".metadata"):
            for key, place, content in _objects(directory, load_metadata(path)):
                _check_nested(load_pt(content, name=place), place, "_extra_state" in key)
        elif name.endswith(".pt"):
            _check_nested(load_pt(path, mmap=True), str(path), "_extra_state" in name)


def _check_backend(path: Path) -> None:
    """Other formats of megatron-core have pickles elsewhere."""
    if not path.exists():
        return
    try:
        backend = read_json(path)["sharded_backend"]
    except (HelixError, KeyError) as error:
        raise HelixError(
            f"{path} is damaged: no valid JSON, or no 'sharded_backend'. {DAMAGED}"
        ) from error
    if backend != "torch_dist":
        raise HelixError(
            f"{path} says that the format is {backend!r}. Only torch_dist can be read: convert the checkpoint "
            "with the Megatron that wrote it."
        )


def _objects(
    directory: Path, metadata: Metadata, only: str | None = None
) -> Iterator[tuple[str, str, bytes]]:
    """(key, name for errors, content) of everything in `.distcp` files that is no tensor."""
    keys = {
        key
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, BytesStorageMetadata) and only in (None, key)
    }
    by_file: dict[str, list[tuple[int, int, str]]] = {}
    for index, place in metadata.storage_data.items():
        if index.fqn in keys:
            if getattr(place, "transform_descriptors", None):
                raise HelixError(
                    f"{directory / place.relative_path} is refused: {index.fqn} is compressed, and cannot be "
                    "inspected.",
                    remedy=TRUST,
                )
            where = (place.offset, place.length, index.fqn)
            by_file.setdefault(place.relative_path, []).append(where)
    for relative_path, places in sorted(by_file.items()):
        path = directory / relative_path
        check_files([path], sys.maxsize)  # it may be a pipe
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for offset, length, key in sorted(places):
                    if offset + length > size:
                        raise HelixError(f"{path} is truncated: it ends inside {key}. {DAMAGED}")
                    file.seek(offset)
                    yield key, f"{path} ({key})", file.read(length)
        except OSError as error:
            raise HelixError(f"{path} cannot be read: {error.strerror}. {DAMAGED}") from error


def _check_nested(value: Any, name: str, extra_state: bool) -> None:
    """Refuse pickles inside values that a model unpickles itself.

    Transformer Engine does so with `_extra_state`, a BytesIO or the bytes of a tensor of whatever dtype.
    """
    if isinstance(value, io.BytesIO):
        content = value.getvalue()
        if content:
            # Tensors in it are the state's own: nobody unpickles what they hold.
            _check_nested(load_pt(content, name=name), name, extra_state=False)
    elif isinstance(value, Tensor):
        if extra_state and value.layout is not torch.strided:
            raise HelixError(f"{name} is refused: its layout is {value.layout}.", remedy=TRUST)
        if extra_state and value.numel():
            _unpickled(value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(), name)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_nested(item, name, extra_state or "_extra_state" in str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_nested(item, name, extra_state)
