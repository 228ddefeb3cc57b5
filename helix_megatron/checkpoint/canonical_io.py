"""Reading canonical checkpoints, one tensor at a time: those that megatron-core writes, and our own.

The format is torch's distributed checkpoint, `torch_dist` in megatron-core: `.distcp` files are tensors and
objects as `torch.save` writes them, one after another, and `.metadata` is a pickled table of them.
"""

from __future__ import annotations

import contextlib
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from helix_megatron.checkpoint.catalog import CanonicalTensor, catalog
from helix_megatron.checkpoint.records import Slice, storage_records
from helix_megatron.checkpoint.safe import SafeFileSystemReader
from helix_megatron.errors import HelixError, listed

# What torch and zipfile raise for a damaged file.
UNREADABLE = (
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    AssertionError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
METADATA_NAME = ".metadata"
PREFIX = "module."  # megatron-core's distributed data parallel puts it before every key
# Transformer Engine's MoE layers have a norm of their own where its dense layers fuse it into linear_fc1.
ALIASES = (("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),)


class CanonicalReader:
    """The tensors of a distributed checkpoint, by canonical name.

    Args:
        directory: with `.metadata` in it.
        flags: model flags, which tell the tensors. Others in the checkpoint (optimizer, random states) are
            not looked at.
        trust: read `.metadata` as a plain pickle.
        before_reading: called with the name of a file before anything is read from it; may raise.

    Raises:
        HelixError: a tensor is missing or has another shape than the flags say, or a file is damaged or
            refused.
    """

    def __init__(
        self,
        directory: Path | str,
        flags: Mapping[str, Any],
        *,
        trust: bool = False,
        before_reading: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self._before_reading = before_reading or (lambda name: None)
        self._reader = SafeFileSystemReader(self.directory, trust=trust)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored: dict[str, TensorStorageMetadata] = {
            key.removeprefix(PREFIX): entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._prefix = (
            PREFIX if any(k.startswith(PREFIX) for k in metadata.state_dict_metadata) else ""
        )
        self._tensors = {tensor.name: tensor for tensor in catalog(flags)}
        self._keys = {name: self._key(tensor) for name, tensor in self._tensors.items()}
        self._by_place: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._check_files(metadata)

    @property
    def files(self) -> list[str]:
        """The files that hold the model's tensors, in the order of the tensors."""
        found: dict[str, None] = {}
        for name in self._tensors:
            for chunk in self._chunks(name).chunks:
                index = MetadataIndex(self._prefix + self._keys[name], chunk.offsets)
                found[self._reader.storage_data[index].relative_path] = None
        return list(found)

    @property
    def names(self) -> list[str]:
        """Canonical names, in the order of the layers."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._stored[self._keys[name]].properties.dtype

    def read(self, name: str) -> Tensor:
        """A whole tensor; not to be written to.

        It is mapped from its file where it lies there in one piece.

        Raises:
            HelixError: as for `read_part`.
        """
        with self._reading(name):
            mapped = self._mapped(name)
        return self.read_part(name) if mapped is None else mapped

    def read_part(
        self, name: str, axis: int = 0, runs: Sequence[tuple[int, int]] | None = None
    ) -> Tensor:
        """Some rows or columns of a tensor, in memory of their own.

        Args:
            name: canonical.
            axis: of the tensor.
            runs: (start, length) along it, in the order wanted; None for the whole tensor.

        Raises:
            HelixError: the file is damaged, or the checkpoint lacks a piece of the tensor.
        """
        tensor, stored = self._tensors[name], self._chunks(name)
        runs = [(0, tensor.shape[axis])] if runs is None else runs
        shape = list(tensor.shape)
        shape[axis] = sum(length for _, length in runs)
        result = torch.empty(shape, dtype=stored.properties.dtype)
        planner = _Into(result, axis, len(tensor.leading))
        items, place = [], 0
        for start, length in runs:
            box = list(tensor.shape)
            box[axis] = length
            offset = [0] * len(box)
            offset[axis] = start
            chunk = ChunkStorageMetadata(
                torch.Size((*tensor.leading, *offset)),
                torch.Size((*(1 for _ in tensor.leading), *box)),
            )
            key = self._prefix + self._keys[name]
            found = create_read_items_for_chunk_list(key, stored, [chunk])
            planner.places[chunk.offsets] = place
            place += length
            items += found
        read = sum(int(torch.Size(item.lengths).numel()) for item in items)
        if read != result.numel():
            raise HelixError(
                f"{self.directory / METADATA_NAME} lists {read} of the {result.numel()} elements of {name}. "
                "The checkpoint is incomplete: copy it again from where it came."
            )
        with self._reading(name):
            for item in items:
                self._before_reading(self._reader.storage_data[item.storage_index].relative_path)
            self._reader.read_data(LoadPlan(items), planner)
        return result

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except HelixError:
            raise
        except UNREADABLE as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise HelixError(
                f"{name} in {self.directory} cannot be read: {reason[0]}. A .distcp file is damaged: copy the "
                "checkpoint again from where it came."
            ) from error

    def _mapped(self, name: str) -> Tensor | None:
        """A tensor that is one contiguous, aligned piece of a file; None of any other."""
        stored, shape = self._chunks(name), self.shape(name)
        leading = self._tensors[name].leading
        whole = (*(1 for _ in leading), *shape)
        if [tuple(chunk.sizes) for chunk in stored.chunks] != [whole] or 0 in whole:
            return None
        index = MetadataIndex(self._prefix + self._keys[name], stored.chunks[0].offsets)
        place = self._reader.storage_data[index]
        if getattr(place, "transform_descriptors", None):
            return None
        self._before_reading(place.relative_path)
        with open(self.directory / place.relative_path, "rb") as file:
            view: Any = Slice(file, place.offset, place.length)
            with torch.serialization.skip_data():  # reads shape and strides, and no bytes
                found = torch.load(view, map_location="cpu", weights_only=True)
            dtype = stored.properties.dtype
            if not isinstance(found, Tensor) or (found.dtype, tuple(found.shape)) != (dtype, whole):
                raise ValueError("it is not what .metadata says")
            records = list(storage_records(view).values())
            if len(records) != 1 or found.storage_offset() or not found.is_contiguous():
                return None
            start, end = place.offset + records[0][0], place.offset + records[0][0] + found.nbytes
            if records[0][1] < found.nbytes or end > place.offset + place.length:
                raise ValueError("its bytes are not all there")
            if start % dtype.itemsize:
                return None
            skip = start % mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(
                file.fileno(), end - start + skip, access=mmap.ACCESS_COPY, offset=start - skip
            )
        return torch.frombuffer(mapping, dtype=dtype, offset=skip).reshape(shape)

    def _chunks(self, name: str) -> TensorStorageMetadata:
        """What is stored of one layer's or expert's tensor: a stacked tensor can have thousands of pieces."""
        key, leading = self._keys[name], self._tensors[name].leading
        stored = self._stored[key]
        if not leading:
            return stored
        depth = len(leading)
        if key not in self._by_place:
            places = self._by_place[key] = {}
            for chunk in stored.chunks:
                ranges = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for place in product(*(range(start, start + size) for start, size in ranges)):
                    places.setdefault(place, []).append(chunk)
        chunks = self._by_place[key].get(leading, [])
        return TensorStorageMetadata(stored.properties, stored.size, chunks)

    def _key(self, tensor: CanonicalTensor) -> str:
        names = [tensor.key, *(tensor.key.replace(a, b) for a, b in ALIASES if a in tensor.key)]
        found = [key for key in names if key in self._stored]
        if not found:
            weights = sorted(key for key in self._stored if not key.startswith("optimizer."))
            raise HelixError(
                f"{self.directory} lacks {tensor.key}. It holds another model than its flags say. Its first "
                f"tensors: {listed(weights[:3])}."
            )
        shape = tuple(self._stored[found[0]].size)
        if shape != tensor.global_shape:
            raise HelixError(
                f"{self.directory} has {tensor.key} of shape {list(shape)}, and the model flags say "
                f"{list(tensor.global_shape)}. It holds another model than its flags say."
            )
        return found[0]

    def _check_files(self, metadata: Metadata) -> None:
        needed: dict[str, int] = {}
        for place in metadata.storage_data.values():
            end = place.offset + place.length
            needed[place.relative_path] = max(end, needed.get(place.relative_path, 0))
        for name, size in sorted(needed.items()):
            path = self.directory / name
            actual = path.stat().st_size if path.is_file() else None
            if actual is None or actual < size:
                problem = (
                    "is missing" if actual is None else f"is truncated: {actual} of {size} bytes"
                )
                raise HelixError(f"{path} {problem}. Copy the checkpoint again from where it came.")


class _Into(LoadPlanner):
    """Copies what is read to its place in one tensor; asked by torch's reader for nothing else."""

    def __init__(self, result: Tensor, axis: int, leading: int) -> None:
        self.result, self.axis, self.leading = result, axis, leading
        self.places: dict[torch.Size, int] = {}

    def resolve_tensor(self, read_item: Any) -> Tensor:
        offsets = list(read_item.dest_offsets)[self.leading :]
        lengths = list(read_item.lengths)[self.leading :]
        offsets[self.axis] += self.places[read_item.dest_index.offset]
        target = self.result
        for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
            target = target.narrow(axis, start, length)
        return target[(None,) * self.leading]

    def commit_tensor(self, read_item: Any, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("reading needs no state dictionary")

    create_local_plan = create_global_plan = finish_plan = load_bytes = set_up_planner  # type: ignore[assignment]
