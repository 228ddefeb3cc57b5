"""Canonical tensors as a Hugging Face checkpoint; one that came from there, in the same files again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.checkpoint.huggingface_form import HuggingFaceForm
from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    WEIGHTS,
    Entry,
    make_index,
    shards,
    write_safetensors,
)
from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.source import write_side_files
from helix_megatron.checkpoint.targets import Report, Row, Tensors, as_json, manifest_of
from helix_megatron.model.packing import KEY as PACKED


class HuggingFaceTarget:
    """A directory as transformers' `save_pretrained` writes it.

    When the source is what came from a Hugging Face model, in files that pack nothing, and neither dtype nor
    size of files is asked for, its files have the same tensors under the same names again. Of a model that
    sees only the text was converted: it becomes a text model.
    """

    kind = "huggingface"
    main = ""

    def __init__(self, tensors: Tensors, shard_size: int | None, default_size: int) -> None:
        self.tensors, self.source = tensors, tensors.source
        self._form = form = HuggingFaceForm(tensors)
        if form.packed:
            warnings.warn(
                f"config.json is written without {PACKED}: the weights are no longer packed.",
                stacklevel=2,
            )
        entries, files = form.entries.values(), form.files
        kept = shard_size is None and not tensors.cast and not form.packed
        if kept and files.keys() >= form.entries.keys():
            self._files: dict[str, list[Entry]] = {}
            for entry in entries:
                self._files.setdefault(files[entry.name], []).append(entry)
        else:
            self._files = shards(entries, shard_size or default_size)
        self.units = sorted(self._files)

    def rows(self) -> Iterator[Row]:
        for file in self.units:
            for entry in self._files[file]:
                first, *others = self._form.rules_of[entry.name]
                origin = self.source.origin(first.name)
                origin += f" and {len(others)} more" if others else ""
                yield Row(**vars(entry), origin=origin, file=file)

    def write(self, unit: str, content: Path, report: Report) -> dict[str, Any]:
        def reported(name: str) -> Tensor:
            value = self._form.tensor(name)
            report(value.nbytes)
            return value

        entry = write_safetensors(content / unit, self._files[unit], reported)
        return {"files": as_json({unit: entry})}

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        write_side_files(self._form.sidecars, content)
        (content / INDEX).unlink(missing_ok=True)
        if list(self._files) != [WEIGHTS]:
            (content / INDEX).write_bytes(make_index(self._files))
        path = content / "config.json"
        if not path.exists() or read_json(path) != self._form.config:
            path.write_text(json.dumps(self._form.config, indent=2, sort_keys=True) + "\n")
        return manifest_of(self.source, self.kind)
