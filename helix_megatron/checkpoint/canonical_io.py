"""Reading canonical checkpoints, one tensor at a time: those that megatron-core writes, and our own.

The format is torch's distributed checkpoint, `torch_dist` in megatron-core: `.distcp` files are tensors and
objects as `torch.save` writes them, one after another, and `.metadata` is a pickled table of them.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from helix_megatron.checkpoint.catalog import CanonicalTensor
from helix_megatron.checkpoint.manifest import TRY, FileEntry, problem
from helix_megatron.checkpoint.safe import METADATA_NAME, load_metadata
from helix_megatron.checkpoint.source import Source
from helix_megatron.errors import HelixError, listed

DATA = ".distcp"  # ending of files with tensors
PREFIX = "module."  # megatron-core's distributed data parallel puts it before every key
# Transformer Engine's MoE layers have a norm of their own where its dense layers fuse it into linear_fc1.
# So have megatron-core's own layers with latent attention, which Transformer Engine's fuse into projections.
ALIASES = (
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    ("self_attention.linear_q_up_proj.layer_norm_", "self_attention.q_layernorm."),
    ("self_attention.linear_kv_up_proj.layer_norm_", "self_attention.kv_layernorm."),
)


class CanonicalReader(Source):
    """The tensors of a distributed checkpoint, of this package or of stock megatron-core.

    Args:
        directory: with `.metadata` in it.
        flags: model flags, which tell the tensors. Others in the checkpoint (optimizer, random states) are
            not looked at.
        trust: read `.metadata` as a plain pickle.
        unverified: files to be compared with their entries just before anything is read from them, so that
            each comes from the disk once.

    Raises:
        HelixError: a tensor is missing or has another shape than the flags say, or a file is damaged or
            refused.
    """

    kind = "canonical"

    def __init__(
        self,
        directory: Path | str,
        flags: Mapping[str, Any],
        *,
        trust: bool = False,
        unverified: Mapping[str, FileEntry] = MappingProxyType({}),
    ) -> None:
        super().__init__(directory, flags)
        self._unverified = dict(unverified)
        metadata = load_metadata(self.directory / METADATA_NAME, trust=trust)
        self._storage = metadata.storage_data
        self._stored: dict[str, TensorStorageMetadata] = {
            key.removeprefix(PREFIX): entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._prefix = (
            PREFIX if any(k.startswith(PREFIX) for k in metadata.state_dict_metadata) else ""
        )
        self._keys = {name: self._key(tensor) for name, tensor in self.tensors.items()}
        self._by_place: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._check_files(metadata)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[self._keys[name]].properties.dtype

    def read(self, name: str) -> Tensor:
        """As in `Source`. It is mapped from its file where it lies there in one piece."""
        tensor = self.tensors[name]
        depth, chunks = len(tensor.leading), self._chunks(tensor)
        with self._reading(name):
            if [tuple(chunk.sizes[depth:]) for chunk in chunks] == [tensor.shape]:
                return self._piece(tensor, chunks[0])
            result = torch.empty(tensor.shape, dtype=self.dtype(name))
            found = 0
            for chunk in chunks:
                piece, target = self._piece(tensor, chunk), result
                for axis, start in enumerate(chunk.offsets[depth:]):
                    target = target.narrow(axis, start, piece.shape[axis])
                target.copy_(piece)
                found += piece.numel()
        if found != result.numel():
            raise HelixError(
                f"{self.directory / METADATA_NAME} lists {found} of the {result.numel()} elements of {name}. "
                "The checkpoint is incomplete: copy it again from where it came."
            )
        return result

    def finish(self) -> None:
        for name in list(self._unverified):
            self._verify(name)

    def _verify(self, name: str) -> None:
        entry = self._unverified.get(name)
        if entry is not None and (text := problem(self.directory / name, entry)):
            raise HelixError(f"{self.directory / name} {text}. {TRY}")
        self._unverified.pop(name, None)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except HelixError:
            raise
        except Exception as error:  # torch raises anything for a damaged file
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise HelixError(
                f"{name} in {self.directory} cannot be read: {reason[0]}. A .distcp file is damaged: copy the "
                "checkpoint again from where it came."
            ) from error

    def _piece(self, tensor: CanonicalTensor, chunk: ChunkStorageMetadata) -> Tensor:
        """What a chunk holds of one layer's or expert's tensor, mapped from its file where that is possible."""
        place = self._place(tensor, chunk)
        if getattr(place, "transform_descriptors", None):
            raise ValueError("it is compressed, which megatron-core does not do")
        self._verify(place.relative_path)
        with open(self.directory / place.relative_path, "rb") as file:
            view: Any = _create_file_view(file, place.offset, place.length)
            found = torch.load(view, map_location="meta", weights_only=True)  # reads no bytes
            dtype = self.dtype(tensor.name)
            if not isinstance(found, Tensor) or (found.dtype, found.shape) != (dtype, chunk.sizes):
                raise ValueError("it is not what .metadata says")
            start = place.offset + getattr(found.untyped_storage(), "_checkpoint_offset", 0)
            if found.storage_offset() or not found.is_contiguous() or start % dtype.itemsize:
                view.seek(0)
                found = torch.load(view, map_location="cpu", weights_only=True)
            elif not found.numel():
                found = torch.empty(found.shape, dtype=dtype)
            else:
                skip = start % mmap.ALLOCATIONGRANULARITY
                if start + found.nbytes > place.offset + place.length:
                    raise ValueError("its bytes are not all there")
                mapping = mmap.mmap(
                    file.fileno(), found.nbytes + skip, access=mmap.ACCESS_COPY, offset=start - skip
                )
                shape = found.shape
                found = torch.frombuffer(mapping, dtype=dtype, offset=skip).reshape(shape)
        inside = (at - first for at, first in zip(tensor.leading, chunk.offsets, strict=False))
        return found[tuple(inside)]

    def _place(self, tensor: CanonicalTensor, chunk: ChunkStorageMetadata) -> Any:
        index = MetadataIndex(self._prefix + self._keys[tensor.name], chunk.offsets)
        if index not in self._storage:
            raise ValueError("a piece of it has no place in a file")
        return self._storage[index]

    def _chunks(self, tensor: CanonicalTensor) -> list[ChunkStorageMetadata]:
        """The pieces of one layer's or expert's tensor: a stacked tensor can have thousands."""
        key, depth = self._keys[tensor.name], len(tensor.leading)
        if key not in self._by_place:
            places = self._by_place[key] = {}
            for chunk in self._stored[key].chunks:
                ranges = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for place in product(*(range(start, start + size) for start, size in ranges)):
                    places.setdefault(place, []).append(chunk)
        return self._by_place[key].get(tensor.leading, [])

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
                what = "is missing" if actual is None else f"is truncated: {actual} of {size} bytes"
                raise HelixError(f"{path} {what}. Copy the checkpoint again from where it came.")
