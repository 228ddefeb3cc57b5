"""A checkpoint of any kind as canonical tensors, one at a time."""

from __future__ import annotations

import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.catalog import (
    Cut,
    catalog,
    segment_local_flags,
    segment_local_permutation,
)
from helix_megatron.model.description import ModelConfig

SIDECARS = "huggingface"  # folder of the other kinds of checkpoints, for what came with a Hugging Face model

COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")


def side_files(folder: Path) -> dict[str, bytes | Path]:
    """The files of a Hugging Face model beside its weights, by name; none that a link brings in from elsewhere.

    In a snapshot of the Hub's cache every file is a link to one of the cache's blobs.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    found: dict[str, bytes | Path] = {}
    for path in sorted(path for pattern in COPIED for path in folder.glob(pattern)):
        if path.is_file() and path.name not in (manifests.MANIFEST_NAME, manifests.CHECKSUM_NAME):
            if path.resolve().parent in inside:
                found[path.name] = path
            else:
                warnings.warn(f"{path} is a link to another folder, and is left out.", stacklevel=2)
    return found


def write_side_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


class Source(ABC):
    """A checkpoint as canonical tensors, which subclasses read.

    Args:
        directory: of the files.
        flags: model flags, which tell the tensors.

    Attributes:
        kind: `canonical`, `huggingface` or `ranks`.
        tensors: by canonical name, in the order of the layers.
        attention, segments, iteration: as in a manifest.
        packing: how files keep some weights in fewer bits, for people; empty where they do not.
    """

    kind = packing = ""
    attention, segments = "exact", 1
    iteration: int | None = None

    def __init__(self, directory: Path | str, flags: Mapping[str, Any]) -> None:
        self.directory, self.flags = Path(directory), dict(flags)
        self.tensors = {tensor.name: tensor for tensor in catalog(flags)}

    @property
    def names(self) -> list[str]:
        """Canonical names, in the order of the layers."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.tensors[name].shape

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor; not to be written to.

        Raises:
            HelixError: a file is damaged, or has not all of the tensor.
        """

    def mixed(self, name: str) -> str | None:
        """How the dtypes of a tensor's pieces differ, for people; None where they are one."""
        return None

    def origin(self, name: str) -> str:
        """What a tensor is made of, for people."""
        return name

    def finish(self) -> None:  # noqa: B027 - most have nothing left to verify
        """Verify what has not been verified yet. Raises HelixError that names a damaged file."""

    def sidecars(self) -> dict[str, bytes | Path]:
        """What a Hugging Face model has beside its weights, by file name: content, or the file that has it.

        Configuration, tokenizer, texts; and the index, which tells what each file of weights held.
        """
        return side_files(self.directory / SIDECARS)


class Derived(Source):
    """The checkpoint of another source as another model's."""

    def __init__(self, source: Source, flags: Mapping[str, Any]) -> None:
        super().__init__(source.directory, flags)
        self._source, self.kind, self.iteration = source, source.kind, source.iteration
        self.attention, self.segments = source.attention, source.segments

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def mixed(self, name: str) -> str | None:
        return self._source.mixed(name)

    def origin(self, name: str) -> str:
        return self._source.origin(name)

    def finish(self) -> None:
        self._source.finish()

    def sidecars(self) -> dict[str, bytes | Path]:
        return self._source.sidecars()


class SegmentLocalSource(Derived):
    """An ordinary model as one with `segment-local` attention: its attention's rows and columns permuted."""

    def __init__(self, source: Source, segments: int) -> None:
        super().__init__(source, segment_local_flags(source.flags, segments))
        self.attention, self.segments = "segment-local", segments
        rows, columns = segment_local_permutation(ModelConfig.from_flags(source.flags), segments)
        orders = {Cut.QKV_ROWS: (0, rows), Cut.PROJ_COLUMNS: (1, columns)}
        self._orders = {
            name: (orders[tensor.cut][0], torch.from_numpy(orders[tensor.cut][1]))
            for name, tensor in source.tensors.items()
            if tensor.cut in orders
        }

    def read(self, name: str) -> Tensor:
        value, order = self._source.read(name), self._orders.get(name)
        return value if order is None else value.index_select(*order)

    def origin(self, name: str) -> str:
        return super().origin(name) + (" (permuted)" if name in self._orders else "")


class UnpaddedSource(Derived):
    """A model without the rows that pad its vocabulary for tensor parallel ranks: no token has them."""

    def __init__(self, source: Source) -> None:
        rows = ModelConfig.from_flags(source.flags).unpadded().padded_vocab_size
        super().__init__(source, source.flags | {"padded_vocab_size": rows})

    def read(self, name: str) -> Tensor:
        return self._source.read(name)[: self.shape(name)[0]]
