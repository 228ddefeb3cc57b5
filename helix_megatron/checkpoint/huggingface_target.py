"""Canonical tensors as a Hugging Face checkpoint; one that came from there, to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    Entry,
    SafetensorsFile,
    header_entries,
    make_header,
    make_index,
    read_json,
    shards,
)
from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.sources import HEADER, copy_sidecars
from helix_megatron.checkpoint.staging import following
from helix_megatron.checkpoint.targets import Mark, Report, Row, Tensors, as_json, manifest_of
from helix_megatron.model.families import Family, family_for_flags, family_of
from helix_megatron.model.families.rules import Rule

READ_AHEAD = (
    2  # tensors of a family's rule that wait for their turn in a file, as multiples of the largest
)


class HuggingFaceTarget:
    """A directory as transformers' `save_pretrained` writes it.

    When the source is what came from a Hugging Face model and neither dtype nor size of files is asked for, its
    files are made again exactly: same names, same order of tensors, same metadata.
    """

    kind = "huggingface"
    main = ""

    def __init__(self, tensors: Tensors, shard_size: int | None, default_size: int) -> None:
        self.tensors, self.source = tensors, tensors.source
        self._sidecars = self.source.sidecars()
        original = self._json("config.json")
        flags = self.source.flags
        self.family: Family = family_of(original) if original else family_for_flags(flags)
        self.config = self.family.config(flags, original) | self._dtype_keys(original)
        self._headers = {
            name.removesuffix(HEADER): content
            if isinstance(content, bytes)
            else content.read_bytes()
            for name, content in self._sidecars.items()
            if name.endswith(HEADER)
        }
        rules = self._rules()
        self._rule_of = {source: rule for rule in rules for source in rule.sources}
        if shard_size is not None or not self._original_fits(rules):
            parts = shards(self._entries(rules), shard_size or default_size)
            self._headers = {
                file: make_header(part, {"format": "pt"}) for file, part in parts.items()
            }
            self._index = make_index(parts) if len(parts) > 1 else None
        else:
            index = self._sidecars.get(INDEX)
            self._index = index.read_bytes() if isinstance(index, Path) else index
        self.units = sorted(self._headers)
        self._waiting: dict[str, Tensor] = {}

    def rows(self) -> Iterator[Row]:
        for file, header in self._sorted_headers():
            for entry in header_entries(header, Path(file)):
                origin = self.source.origin(self._rule_of[entry.name].name)
                yield Row(entry.name, entry.shape, entry.dtype, origin, file)

    def write(
        self, unit: str, content: Path, report: Report, mark: Mark, begun: dict[str, Any] | None
    ) -> dict[str, Any]:
        path = content / unit
        with SafetensorsFile(path, self._headers[unit]) as file, following(path) as digester:
            for entry in file.missing:
                value = self._tensor(entry.name)
                file.add(value)
                digester.advance(file.written)
                report(value.nbytes)
            file.close()
            return {"files": as_json({unit: digester.finish(file.written)})}

    def finish(self, content: Path, records: Mapping[str, dict[str, Any]]) -> Manifest:
        others = {
            name: value
            for name, value in self._sidecars.items()
            if not name.endswith(HEADER) and name != INDEX
        }
        copy_sidecars(others, content)
        if (
            not (content / "config.json").exists()
            or read_json(content / "config.json") != self.config
        ):
            text = json.dumps(self.config, indent=2, sort_keys=True)
            (content / "config.json").write_text(text + "\n")
        if self._index is not None:
            (content / INDEX).write_bytes(self._index)
        return manifest_of(self.source, self.kind)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self._sidecars.get(name)
        return read_json(path) if isinstance(path, Path) else None

    def _dtype_keys(self, original: Mapping[str, Any] | None) -> dict[str, str]:
        """What config.json says about the dtype, where that is not what it said before."""
        kinds = {str(dtype).removeprefix("torch.") for dtype in self.tensors.dtypes.values()}
        if len(kinds) > 1 or (original is not None and not self.tensors.cast):
            return {}
        keys = [key for key in ("dtype", "torch_dtype") if key in (original or {})] or ["dtype"]
        return dict.fromkeys(keys, kinds.pop())

    def _sorted_headers(self) -> list[tuple[str, bytes]]:
        return sorted(self._headers.items())

    def _rules(self) -> list[Rule]:
        """With the names that the original files had, where they are known."""
        names = [
            entry.name
            for file, header in self._headers.items()
            for entry in header_entries(header, Path(file))
        ]
        return self.family.rules(self.source.flags, names or None)

    def _entries(self, rules: Sequence[Rule]) -> Iterator[Entry]:
        for rule in rules:
            dtype = self.tensors.dtypes[rule.name]
            for name, shape in zip(rule.sources, rule.shapes, strict=True):
                yield Entry(name, dtype, tuple(shape))

    def _original_fits(self, rules: Sequence[Rule]) -> bool:
        """Whether the original files held exactly the tensors that are to be written."""
        found = [
            entry
            for file, header in self._headers.items()
            for entry in header_entries(header, Path(file))
        ]
        return set(found) == set(self._entries(rules)) and bool(found)

    def _tensor(self, name: str) -> Tensor:
        """One Hugging Face tensor; its neighbours from the same canonical one wait for their turn."""
        if name not in self._waiting:
            rule = self._rule_of[name]
            limit = READ_AHEAD * sum(torch.Size(shape).numel() for shape in rule.shapes)
            if sum(tensor.numel() for tensor in self._waiting.values()) > limit:
                self._waiting.clear()
            parts = rule.from_canonical(self.tensors.read(rule.name))
            self._waiting.update(zip(rule.sources, parts, strict=True))
        return self._waiting.pop(name)
