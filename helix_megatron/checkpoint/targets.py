"""What a conversion writes: canonical tensors as any kind of checkpoint, part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from helix_megatron.checkpoint.canonical_files import (
    CanonicalFile,
    all_objects,
    empty_state,
    write_common,
    write_metadata,
)
from helix_megatron.checkpoint.catalog import CanonicalTensor, catalog
from helix_megatron.checkpoint.foreign import is_plain_name
from helix_megatron.checkpoint.huggingface_io import Entry
from helix_megatron.checkpoint.manifest import FileEntry, Manifest, digest
from helix_megatron.checkpoint.partition import MANIFEST_KEYS, RankLayout
from helix_megatron.checkpoint.rank_io import LATEST, StageFiles, file_name, local_shapes
from helix_megatron.checkpoint.source import SIDECARS, Source, write_side_files
from helix_megatron.checkpoint.store import POINTER
from helix_megatron.errors import HelixError, Setting
from helix_megatron.versions import installed

Report = Callable[[int], None]
"""Called with the number of bytes that have just been written."""


@dataclass(frozen=True)
class Row(Entry):
    """One tensor of the result, for a table: `origin` says what it is made of."""

    origin: str
    file: str


class Target(Protocol):
    """A checkpoint to be written.

    Attributes:
        kind: `canonical`, `huggingface` or `ranks`.
        main: where the checkpoint itself is below the target directory.
        units: names of the parts, in order.
    """

    kind: str
    main: str
    units: list[str]

    def rows(self) -> Iterator[Row]:
        """Every tensor of the result."""

    def write(self, unit: str, content: Path, report: Report) -> dict[str, Any]:
        """Write one part below `content`; what is returned (JSON values) is given to `finish`.

        The result's `files` are the part's files with size and hash.
        """

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        """Write the small files; the manifest is complete but for `files`."""


class Tensors:
    """The source's tensors in the dtype wanted.

    Raises:
        HelixError: pieces of one tensor have different dtypes, and no dtype is wanted.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        self.source, self._dtype, self.cast = source, dtype, dtype is not None
        self.dtypes = {name: self._wanted(source.dtype(name)) for name in source.names}
        mixed = None if self.cast else next(filter(None, map(source.mixed, source.names)), None)
        if mixed:
            raise HelixError(
                f"tensor {mixed}, but both become parts of one.",
                remedy=("Give one for all, for example ", Setting("dtype", "bf16"), "."),
            )

    def read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.dtypes[name])

    def _wanted(self, own: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and own.is_floating_point else own


def as_json(files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {name: entry.to_json() for name, entry in files.items()}


def manifest_of(source: Source, kind: str, **others: Any) -> Manifest:
    """A manifest, without files, of what is converted from `source`."""
    facts: dict[str, Any] = {
        "kind": kind,
        "model": source.flags,
        "attention": source.attention,
        "segments": source.segments,
        "iteration": None,  # weights only: training begins anew
        "versions": installed("torch", "safetensors"),
        "extra": {"converted_from": source.kind, "source_iteration": source.iteration},
    }
    return Manifest(**(facts | others))


# --------------------------------------------------------------------- canonical


class CanonicalTarget:
    """A store of one checkpoint, which both the training script and stock Megatron-LM load.

    It lies in `DIR/release`, and `DIR/latest_checkpointed_iteration.txt` says `release`: Megatron's name for
    weights without a place in training. It then loads no optimizer state and begins at iteration 0.
    """

    kind = "canonical"
    main = "release"

    def __init__(self, tensors: Tensors, shard_size: int) -> None:
        self.tensors, self.source = tensors, tensors.source
        self._parts: list[list[CanonicalTensor]] = [[]]
        size = 0
        for tensor in catalog(self.source.flags):
            nbytes = tensor.numel * tensors.dtypes[tensor.name].itemsize
            if self._parts[-1] and size + nbytes > shard_size:
                self._parts.append([])
                size = 0
            self._parts[-1].append(tensor)
            size += nbytes
        self.units = [f"__0_{number}.distcp" for number in range(len(self._parts))]

    def rows(self) -> Iterator[Row]:
        for unit, part in zip(self.units, self._parts, strict=True):
            for tensor in part:
                origin = self.source.origin(tensor.name)
                dtype = self.tensors.dtypes[tensor.name]
                yield Row(tensor.name, dtype, tensor.shape, origin, f"{self.main}/{unit}")

    def write(self, unit: str, content: Path, report: Report) -> dict[str, Any]:
        folder = content / self.main
        folder.mkdir(exist_ok=True)
        number = self.units.index(unit)
        tensors: dict[str, Any] = {}
        objects: dict[str, Any] = {}
        with CanonicalFile(folder / unit) as file:
            if number == 0:
                empty = empty_state()
                objects = {key: file.add_object(empty) for key in all_objects(self.source.flags)}
            for tensor in self._parts[number]:
                value = self.tensors.read(tensor.name)
                tensors[tensor.name] = file.add(value[(None,) * len(tensor.leading)])
                report(value.nbytes)
            files = as_json({f"{self.main}/{unit}": file.finish()})
        return {"files": files, "tensors": tensors, "objects": objects}

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        folder = content / self.main
        tensors, objects = (
            {
                name: (unit, tuple(place))
                for unit, record in records.items()
                for name, place in record[table].items()
            }
            for table in ("tensors", "objects")
        )
        write_metadata(folder, self.source.flags, tensors, objects, self.tensors.dtypes)
        write_common(folder, self.source.flags, iteration=0)
        if sidecars := self.source.sidecars():
            write_side_files(sidecars, folder / SIDECARS)
        (content / POINTER).write_text("release")
        return manifest_of(self.source, self.kind, layout={"tp": 1, "pp": 1, "dp": 1, "ep": 1})


# -------------------------------------------------------------------------- ranks


class RankTarget:
    """One file per rank, as DeepSpeed writes them. A part is a pipeline stage."""

    kind = "ranks"
    main = ""

    def __init__(self, tensors: Tensors, layout: RankLayout, tag: str) -> None:
        self.tensors, self.source, self.layout, self.tag = tensors, tensors.source, layout, tag
        if not is_plain_name(tag) or tag == LATEST:
            raise HelixError(f"the tag {tag!r:.120} cannot name a directory. Try global_step0.")
        self.units = [f"stage {stage}" for stage in range(layout.pipeline)]

    def rows(self) -> Iterator[Row]:
        tensors = catalog(self.layout.flags)
        for rank in range(self.layout.num_ranks):
            file = f"{self.tag}/{file_name(rank)}"
            for name, (tensor, shape) in local_shapes(self.layout, rank, tensors).items():
                origin = self.source.origin(tensor.name)
                yield Row(name, self.tensors.dtypes[tensor.name], shape, origin, file)

    def write(self, unit: str, content: Path, report: Report) -> dict[str, Any]:
        folder = content / self.tag
        folder.mkdir(exist_ok=True)
        stage = self.units.index(unit)
        with StageFiles(folder, self.layout, stage, self.tensors.dtypes) as files:
            for tensor in files.tensors:
                report(files.write(tensor, self.tensors.read(tensor.name)))
            paths = list(files.paths.values())
        with ThreadPoolExecutor(4) as pool:
            entries = pool.map(digest, paths)
            named = zip(paths, entries, strict=True)
            return {"files": as_json({f"{self.tag}/{path.name}": e for path, e in named})}

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        if sidecars := self.source.sidecars():
            write_side_files(sidecars, content / SIDECARS)
        (content / LATEST).write_text(self.tag)
        layout, heads = self.layout, self.layout.heads
        m = layout.helix.intra_head_parallel_size
        facts = {key: getattr(layout, name) for key, name in MANIFEST_KEYS.items()}
        facts |= {"m": m, "n": layout.tensor // m, "tag": self.tag}
        facts["query_layout"] = heads.query_layout if heads else "auto"
        return manifest_of(self.source, self.kind, layout=facts)
