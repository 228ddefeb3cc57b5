"""A checkpoint in the form of a Hugging Face model: its config.json, and its tensors as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.checkpoint.huggingface_io import INDEX, Entry, weight_map
from helix_megatron.checkpoint.source import SIDECARS, Source, UnpaddedSource
from helix_megatron.checkpoint.targets import Tensors
from helix_megatron.model.families import Family, family_for_flags, family_of
from helix_megatron.model.families.rules import rules_by_source, source_tensors
from helix_megatron.model.families.towers import is_tower, text_config
from helix_megatron.model.packing import packing_of

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
READ_AHEAD = 2  # tensors that wait for their turn, as multiples of those of one canonical tensor


class HuggingFaceForm:
    """What a checkpoint is as a Hugging Face model; nothing is written.

    What came from a Hugging Face model has its configuration again. Of a model that sees only the text was
    converted: it becomes a text model.

    Args:
        tensors: of the checkpoint, whose vocabulary is not padded.
        as_before: whether tensors have the names of the files that the checkpoint came from; otherwise those
            that the family's models have by default.

    Attributes:
        config: the content of config.json.
        entries: its tensors, by name. Those that one canonical tensor makes follow each other.
        files: tensor → file, of the files that the checkpoint came from; empty where it came from none, or
            names are not as before.
        packed: whether those files had weights in fewer bits.
        sidecars: see `Source.sidecars`.

    Raises:
        HelixError: no family of Hugging Face models can express it.
    """

    def __init__(self, tensors: Tensors, *, as_before: bool = True) -> None:
        self.tensors, self.source = tensors, tensors.source
        self.sidecars = self.source.sidecars()
        whole = self._json("config.json")
        original = None if whole is None else dict(text_config(whole))
        flags = self.source.flags
        self.family: Family = family_of(original) if original else family_for_flags(flags)
        self.config = self.family.config(flags, original) | self._dtype_keys(original)
        if original is None:  # what was trained here has none of its type's special tokens
            self.config |= dict.fromkeys(SPECIAL_TOKENS)
        self.packed = whole is not None and packing_of(whole) is not None
        tower = whole is not None and is_tower(whole)
        if tower:
            self.config["architectures"] = [self.family.architecture]
        index = self._json(INDEX) if as_before and not tower else None
        self.files = weight_map(index, self.source.directory / INDEX) if index else {}
        rules = self.family.rules(flags, list(self.files) or None)
        self.rules_of = rules_by_source(rules)
        self.entries = {
            name: Entry(name, tensors.dtypes[rule.name], tuple(shape))
            for rule in rules
            for name, shape in zip(rule.sources, rule.shapes, strict=True)
        }
        self._waiting: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """One tensor; its neighbours from the same canonical one wait for their turn."""
        if name not in self._waiting:
            rules = self.rules_of[name]
            limit = READ_AHEAD * sum(torch.Size(shape).numel() for shape in rules[0].shapes)
            if sum(tensor.numel() for tensor in self._waiting.values()) > limit:
                self._waiting.clear()
            self._waiting |= source_tensors(rules, self.tensors.read)
        return self._waiting.pop(name)

    def _json(self, name: str) -> dict[str, Any] | None:
        found = self.sidecars.get(name)
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


class ConvertedFiles:
    """A checkpoint as the files that its conversion would write, each tensor made when it is read.

    It is read as a `HuggingFaceReader` is. Whoever asks for tensors in the order of `names` has each canonical
    tensor read once, and at most one of them in memory beside what is made of it.

    Args:
        source: the checkpoint, of any kind but `huggingface`.

    Attributes:
        directory: of the checkpoint.
        sidecars: the folder of configuration and tokenizer, which may not exist.
        config: the content of config.json.

    Raises:
        HelixError: no family of Hugging Face models can express it.
    """

    packing = None

    def __init__(self, source: Source) -> None:
        self._form = HuggingFaceForm(Tensors(UnpaddedSource(source), None), as_before=False)
        self.directory, self.sidecars = source.directory, source.directory / SIDECARS
        self.config = {"model_type": self._form.family.name} | self._form.config
        self.finish = source.finish

    @property
    def names(self) -> list[str]:
        """Of all tensors, those that one canonical tensor makes one after another."""
        return list(self._form.entries)

    def entry(self, name: str) -> Entry:
        """dtype and shape of a tensor."""
        return self._form.entries[name]

    def pieces(self, name: str) -> Iterator[tuple[int | None, Tensor]]:
        """As of `HuggingFaceReader`: of a tensor that stacks experts one after another."""
        if self._form.rules_of[name][0].place is None:
            yield None, self._form.tensor(name)
            return
        for rule in self._form.rules_of[name]:
            parts = rule.from_canonical(self._form.tensors.read(rule.name))
            yield rule.place, parts[rule.sources.index(name)]
