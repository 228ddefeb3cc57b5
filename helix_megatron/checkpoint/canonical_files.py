"""Writing canonical checkpoints, one tensor at a time: distributed checkpoints that megatron-core reads.

torch's own writer keeps all tensors of a file in memory until the file is complete, and copies each twice, so
files are written here. `canonical_io` describes the format.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
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
from helix_megatron.checkpoint.huggingface_io import tensor_bytes
from helix_megatron.checkpoint.output import OutputFile
from helix_megatron.errors import HelixError, Setting

CHECKPOINT_VERSION = 3.0  # Megatron-LM's number for the order of rows that megatron-core has
ALIGNMENT = 64  # of tensors in a file, as of their bytes inside what torch.save writes: so they can be mapped

Place = tuple[int, int]  # offset and length in a file


class CanonicalFile(OutputFile):
    """One `.distcp` file, written tensor by tensor."""

    def add(self, tensor: Tensor) -> Place:
        """Append a box of a key's global tensor, of shape (1, …, 1, *shape), as `torch.save` would.

        `torch.save` itself copies the bytes twice and computes a CRC-32 of them, which `torch.load` ignores.
        """
        self.write(b"\0" * (-self.written % ALIGNMENT))
        start = self.written
        with zipfile.ZipFile(_Stream(self), "w") as archive:  # type: ignore[call-overload]
            records = {"data.pkl": _pickled(tensor), "byteorder": sys.byteorder, "version": "3\n"}
            for name, content in records.items():
                # With an entry of its own, an archive does not tell when it was written.
                archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
            entry = zipfile.ZipInfo("archive/data/0")
            stream: Any = archive.fp
            entry.header_offset = stream.tell()
            entry.file_size = entry.compress_size = tensor.nbytes
            entry.CRC = 0
            large = tensor.nbytes > zipfile.ZIP64_LIMIT
            unpadded = entry.header_offset + len(entry.FileHeader(large)) + 4
            padding = -unpadded % ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)  # as torch pads
            stream.write(entry.FileHeader(large))
            stream.write(tensor_bytes(tensor))
            archive.filelist.append(entry)
            archive.start_dir = stream.tell()  # where the table of entries follows
        return start, self.written - start

    def add_object(self, content: bytes) -> Place:
        """Append an object that `torch.save` has written."""
        start = self.written
        self.write(content)
        return start, len(content)


class _Stream:
    """What `zipfile` needs of a file that cannot seek: so its offsets begin at each archive."""

    def __init__(self, file: OutputFile) -> None:
        self.write = file.write

    def flush(self) -> None:
        pass


def _pickled(tensor: Tensor) -> bytes:
    """The pickle in which `torch.save` describes a tensor of this shape and dtype that has its own storage."""
    content = io.BytesIO()
    _Pickler(content, protocol=2).dump(torch.empty(tensor.shape, dtype=tensor.dtype))
    return content.getvalue()


class _Pickler(pickle.Pickler):
    """Names storage 0 where a storage would be pickled, as `torch.save` does."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            kind = getattr(torch, obj._pickle_storage_type())
            return "storage", kind, "0", "cpu", obj._size()
        if isinstance(obj, torch.UntypedStorage):
            return "storage", torch.UntypedStorage, "0", "cpu", obj.nbytes()
        return None


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
                "tensor.",
                remedy=("Give one for all, for example ", Setting("dtype", "bf16"), "."),
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
