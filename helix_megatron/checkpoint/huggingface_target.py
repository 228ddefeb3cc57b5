"""Canonical tensors as a Hugging Face checkpoint; one that came from there, in the same files again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    WEIGHTS,
    Entry,
    make_index,
    shards,
    weight_map,
    write_safetensors,
)
from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.source import write_side_files
from helix_megatron.checkpoint.targets import Report, Row, Tensors, as_json, manifest_of
from helix_megatron.model.families import Family, family_for_flags, family_of
from helix_megatron.model.families.rules import rules_by_source, source_tensors
from helix_megatron.model.families.towers import is_tower, text_config
from helix_megatron.model.packing import KEY as PACKED
from helix_megatron.model.packing import packing_of

READ_AHEAD = (
    2  # tensors of a family's rule that wait for their turn in a file, as multiples of the largest
)


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
        self._sidecars = self.source.sidecars()
        whole = self._json("config.json")
        original = None if whole is None else dict(text_config(whole))
        flags = self.source.flags
        self.family: Family = family_of(original) if original else family_for_flags(flags)
        self.config = self.family.config(flags, original) | self._dtype_keys(original)
        packed = whole is not None and packing_of(whole) is not None
        if packed:
            warnings.warn(
                f"config.json is written without {PACKED}: the weights are no longer packed.",
                stacklevel=2,
            )
        tower = whole is not None and is_tower(whole)
        if tower:
            self.config["architectures"] = [self.family.architecture]
        index = None if tower else self._json(INDEX)
        files = weight_map(index, self.source.directory / INDEX) if index else {}
        rules = self.family.rules(flags, list(files) or None)
        self._rules_of = rules_by_source(rules)
        entries = list(
            {
                name: Entry(name, tensors.dtypes[rule.name], tuple(shape))
                for rule in rules
                for name, shape in zip(rule.sources, rule.shapes, strict=True)
            }.values()
        )
        kept = shard_size is None and not tensors.cast and not packed
        if kept and files.keys() >= self._rules_of.keys():
            self._files: dict[str, list[Entry]] = {}
            for entry in entries:
                self._files.setdefault(files[entry.name], []).append(entry)
        else:
            self._files = shards(entries, shard_size or default_size)
        self.units = sorted(self._files)
        self._waiting: dict[str, Tensor] = {}

    def rows(self) -> Iterator[Row]:
        for file in self.units:
            for entry in self._files[file]:
                first, *others = self._rules_of[entry.name]
                origin = self.source.origin(first.name)
                origin += f" and {len(others)} more" if others else ""
                yield Row(**vars(entry), origin=origin, file=file)

    def write(self, unit: str, content: Path, report: Report) -> dict[str, Any]:
        def reported(name: str) -> Tensor:
            value = self._tensor(name)
            report(value.nbytes)
            return value

        entry = write_safetensors(content / unit, self._files[unit], reported)
        return {"files": as_json({unit: entry})}

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        write_side_files(self._sidecars, content)
        (content / INDEX).unlink(missing_ok=True)
        if list(self._files) != [WEIGHTS]:
            (content / INDEX).write_bytes(make_index(self._files))
        path = content / "config.json"
        if not path.exists() or read_json(path) != self.config:
            path.write_text(json.dumps(self.config, indent=2, sort_keys=True) + "\n")
        return manifest_of(self.source, self.kind)

    def _json(self, name: str) -> dict[str, Any] | None:
        found = self._sidecars.get(name)
        if isinstance(found, bytes):
            return json.loads(found)
        return None if found is None else read_json(found)

    def _dtype_keys(self, original: Mapping[str, Any] | None) -> dict[str, str]:
        """What config.json says about the dtype, where that is not what it said before."""
        kinds = {str(dtype).removeprefix("torch.") for dtype in self.tensors.dtypes.values()}
        if len(kinds) > 1 or (original is not None and not self.tensors.cast):
            return {}
        # As transformers 5 and 4 call it.
        return dict.fromkeys(("dtype", "torch_dtype"), kinds.pop())

    def _tensor(self, name: str) -> Tensor:
        """One Hugging Face tensor; its neighbours from the same canonical one wait for their turn."""
        if name not in self._waiting:
            rules = self._rules_of[name]
            limit = READ_AHEAD * sum(torch.Size(shape).numel() for shape in rules[0].shapes)
            if sum(tensor.numel() for tensor in self._waiting.values()) > limit:
                self._waiting.clear()
            self._waiting |= source_tensors(rules, self.tensors.read)
        return self._waiting.pop(name)
