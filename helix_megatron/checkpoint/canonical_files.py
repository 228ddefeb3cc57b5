"""Writing canonical checkpoints, one tensor at a time: distributed checkpoints that megatron-core reads.

torch's own writer keeps all tensors of a file in memory until the file is complete, so files are written here.
`canonical_io` describes the format.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from helix_megatron.checkpoint.canonical_io import METADATA_NAME
from helix_megatron.checkpoint.catalog import catalog, extra_states
from helix_megatron.errors import HelixError

CHECKPOINT_VERSION = 3.0  # Megatron-LM's number for the order of rows that megatron-core has
ALIGNMENT = 64  # of tensors in a file, as of their bytes inside what torch.save writes: so they can be mapped

Place = tuple[int, int]  # offset and length in a file


class CanonicalFile:
    """One `.distcp` file, written tensor by tensor.

    Args:
        path: of the file, replaced if it exists.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115

    def add(self, tensor: Tensor) -> Place:
        """Append a tensor of shape (1, …, 1, *shape): one box of the key's global tensor."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        start = self._file.tell()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # torch.save would write the whole storage
        with _without_checksums():
            torch.save(tensor.contiguous(), self._file)
        return start, self._file.tell() - start

    def add_object(self, content: bytes) -> Place:
        """Append an object that `torch.save` has written."""
        start = self._file.tell()
        self._file.write(content)
        return start, len(content)

    @property
    def written(self) -> int:
        """Bytes in the file, some still in its buffer."""
        return self._file.tell()

    def flush(self) -> int:
        """Hand what was added to the operating system; bytes in the file."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        """Flush, put everything on the disk, close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> CanonicalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save takes longer for a CRC-32, which torch.load ignores, than for everything else together."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def empty_state() -> bytes:
    """What megatron-core stores for the `_extra_state` of a linear layer that has none."""
    content = io.BytesIO()
    torch.save([None], content)
    return content.getvalue()


def object_key(key: str, place: Sequence[int], shape: Sequence[int]) -> str:
    """How megatron-core names one of an object's parts."""
    return f"{key}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, shape))}"


def write_metadata(
    directory: Path,
    flags: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, Place]],
    objects: Mapping[str, tuple[str, Place]],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Write `.metadata`, the table of all files.

    Args:
        directory: of the checkpoint.
        flags: model flags.
        tensors: canonical name → file and place in it.
        objects: `object_key` → file and place in it.
        dtypes: canonical name → dtype.

    Raises:
        HelixError: layers of one stacked tensor have different dtypes.
    """
    table: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    first: dict[str, str] = {}
    for tensor in catalog(flags):
        dtype = dtypes[tensor.name]
        entry = table.get(tensor.key)
        if entry is None:
            properties = TensorProperties(dtype=dtype)
            size = torch.Size(tensor.global_shape)
            entry = table[tensor.key] = TensorStorageMetadata(properties, size, [])
            first[tensor.key] = tensor.name
        elif entry.properties.dtype != dtype:
            other = first[tensor.key]
            raise HelixError(
                f"{tensor.name} is {dtype} and {other} is {dtypes[other]}, but Megatron keeps them in one "
                "tensor. Give one dtype for all with --dtype."
            )
        offsets = torch.Size((*tensor.leading, *(0 for _ in tensor.shape)))
        sizes = torch.Size((*(1 for _ in tensor.leading), *tensor.shape))
        index = MetadataIndex(tensor.key, offsets, len(entry.chunks))
        entry.chunks.append(ChunkStorageMetadata(offsets, sizes))
        name, place = tensors[tensor.name]
        storage[index] = _StorageInfo(name, *place)
    for key, (name, place) in objects.items():
        table[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(name, *place)
    content = pickle.dumps(Metadata(state_dict_metadata=table, storage_data=storage))
    (directory / METADATA_NAME).write_bytes(content)


def write_common(directory: Path, flags: Mapping[str, Any], iteration: int) -> None:
    """Write `common.pt` and `metadata.json`: arguments and format, as Megatron-LM looks for them."""
    arguments = argparse.Namespace(
        **flags,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        world_size=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )
    common = {
        "args": arguments,
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": iteration,
    }
    torch.save(common, directory / "common.pt")
    formats = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (directory / "metadata.json").write_text(json.dumps(formats))


def all_objects(flags: Mapping[str, Any]) -> list[str]:
    """`object_key` of every object that a model's layers ask for."""
    return [object_key(*entry) for entry in extra_states(flags)]
