"""What a conversion reads: any kind of checkpoint as canonical tensors, one at a time."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.canonical_io import METADATA_NAME, CanonicalReader
from helix_megatron.checkpoint.catalog import (
    Cut,
    catalog,
    segment_local_flags,
    segment_local_permutation,
)
from helix_megatron.checkpoint.foreign import read_json, resolved
from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    WEIGHTS,
    HuggingFaceReader,
    make_index,
    snapshot_of,
)
from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.checkpoint.rank_io import LATEST, RankReader, rank_directory
from helix_megatron.checkpoint.safe import load_common
from helix_megatron.checkpoint.side_files import side_files
from helix_megatron.checkpoint.store import Store
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.model.description import FUNCTION_FLAGS, ModelConfig, complete
from helix_megatron.model.families import family_of
from helix_megatron.model.families.rules import Rule

MOST_RANKS = 10**6  # in each direction
DATA = ".distcp"  # ending of files with tensors
SIDECARS = "huggingface"  # folder of the other kinds of checkpoints, for what came with a Hugging Face model
OTHER_FLAGS = (
    "group_query_attention",
    "vocab_size",
    "padded_vocab_size",
    "seq_length",
    "make_vocab_size_divisible_by",
)


class Source:
    """A checkpoint as canonical tensors, one at a time.

    Attributes:
        kind: `canonical`, `huggingface` or `ranks`.
        directory: of the files.
        flags: model flags of the tensors.
        attention, segments, iteration: as in a manifest.
        names: canonical names, in the order of the layers.
    """

    kind = ""
    names: list[str]

    def __init__(
        self, directory: Path, flags: Mapping[str, Any], manifest: Manifest | None
    ) -> None:
        self.directory = directory
        self.flags = dict(flags)
        self.attention = manifest.attention if manifest else "exact"
        self.segments = manifest.segments if manifest else 1
        self.iteration = manifest.iteration if manifest else None
        self._reader: Any = None  # of canonical tensors, where the files hold such

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._reader.dtype(name)

    def read(self, name: str) -> Tensor:
        """A tensor; not to be written to."""
        return self._reader.read(name)

    def mixed(self, name: str) -> str | None:
        """How the dtypes of a tensor's pieces differ, for people; None where they are one."""
        return (
            None
            if self._reader is None or not isinstance(self._reader, Source)
            else self._reader.mixed(name)
        )

    def origin(self, name: str) -> str:
        """What a tensor is made of, for people."""
        return name

    def finish(self) -> None:
        """Verify what has not been verified yet. Raises HelixError that names a damaged file."""

    def sidecars(self) -> dict[str, bytes | Path]:
        """What a Hugging Face model has beside its weights, by file name: content, or the file that has it.

        Configuration, tokenizer, texts; and the index, which tells what each file of weights held.
        """
        return side_files(self.directory / SIDECARS)


class CanonicalSource(Source):
    """A distributed checkpoint, of this package or of stock megatron-core."""

    kind = "canonical"

    def __init__(
        self, directory: Path, manifest: Manifest | None, *, trust: bool, verify: bool
    ) -> None:
        flags = manifest.model if manifest is not None else stock_flags(directory, trust=trust)
        super().__init__(directory, flags, manifest)
        self._reader = CanonicalReader(directory, flags, trust=trust, before_reading=self._verify)
        self.names = self._reader.names
        # A file is verified just before it is read: so it comes from the disk once.
        entries = manifest.files if verify and manifest is not None else {}
        self._unverified = {name: entries[name] for name in entries if name.endswith(DATA)}

    def finish(self) -> None:
        for name in list(self._unverified):
            self._verify(name)

    def _verify(self, name: str) -> None:
        entry = self._unverified.get(name)
        if entry is not None:
            if text := manifests.problem(self.directory / name, entry):
                raise HelixError(f"{self.directory / name} {text}. {manifests.TRY}")
            del self._unverified[name]


class HuggingFaceSource(Source):
    """A directory as transformers' `save_pretrained` writes it."""

    kind = "huggingface"

    def __init__(self, directory: Path, manifest: Manifest | None) -> None:
        config = read_json(directory / "config.json")
        self._files = HuggingFaceReader(directory)
        self.family = family_of(config)
        super().__init__(directory, self.family.model_flags(config), manifest)
        rules = self.family.rules(self.flags, self._files.names)
        self._rules: dict[str, Rule] = {rule.name: rule for rule in rules}
        self.names = [tensor.name for tensor in catalog(self.flags)]
        assert set(self.names) == set(self._rules), (
            "the family's rules are not the catalog's tensors"
        )
        for rule in rules:
            self._check(rule)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rules[name].shape

    def dtype(self, name: str) -> torch.dtype:
        dtypes = {self._files.entry(source).dtype for source in self._rules[name].sources}
        if len(dtypes) > 1 and all(dtype.is_floating_point for dtype in dtypes):
            return torch.float64 if torch.float64 in dtypes else torch.float32  # holds all others
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str) -> Tensor:
        rule, dtype = self._rules[name], self.dtype(name)
        return rule.to_canonical([self._files.read(source).to(dtype) for source in rule.sources])

    def mixed(self, name: str) -> str | None:
        first, *others = ((s, self._files.entry(s).dtype) for s in self._rules[name].sources)
        other = next((pair for pair in others if pair[1] != first[1]), None)
        return None if other is None else f"{other[0]} is {other[1]} and {first[0]} is {first[1]}"

    def origin(self, name: str) -> str:
        return ", ".join(self._rules[name].sources)

    def sidecars(self) -> dict[str, bytes | Path]:
        return {INDEX: make_index(self._files.files)} | side_files(self.directory)

    def _check(self, rule: Rule) -> None:
        """Wrong shapes are told before the first tensor is converted, not hours later."""
        for source, shape in zip(rule.sources, rule.shapes, strict=True):
            actual = self._files.entry(source).shape
            if actual != tuple(shape):
                raise HelixError(
                    f"tensor {source} of {self.directory / self._files.file(source)} has shape "
                    f"{list(actual)}, and config.json makes it {list(shape)}. Check that config.json is "
                    "this model's."
                )


class RankSource(Source):
    """A directory with one file per rank."""

    kind = "ranks"

    def __init__(self, directory: Path, manifest: Manifest, *, trust: bool) -> None:
        super().__init__(directory, manifest.model, manifest)
        self._reader = RankReader(directory, layout_of(manifest), trust=trust)
        self.names = self._reader.names


class SegmentLocalSource(Source):
    """An ordinary model as one with `segment-local` attention: its attention's rows and columns permuted."""

    def __init__(self, source: Source, segments: int) -> None:
        super().__init__(source.directory, segment_local_flags(source.flags, segments), None)
        self._reader, self.kind, self.iteration = source, source.kind, source.iteration
        self.attention, self.segments = "segment-local", segments
        self.names, self.finish, self.sidecars = source.names, source.finish, source.sidecars  # type: ignore[method-assign]
        rows, columns = segment_local_permutation(ModelConfig.from_flags(source.flags), segments)
        self._order = {
            Cut.QKV_ROWS: (0, torch.from_numpy(rows)),
            Cut.PROJ_COLUMNS: (1, torch.from_numpy(columns)),
        }
        self._cuts = {tensor.name: tensor.cut for tensor in catalog(source.flags)}

    def read(self, name: str) -> Tensor:
        value, order = self._reader.read(name), self._order.get(self._cuts[name])
        return value if order is None else value.index_select(*order)

    def origin(self, name: str) -> str:
        permuted = " (permuted)" if self._cuts[name] in self._order else ""
        return self._reader.origin(name) + permuted


class UnpaddedSource(Source):
    """A model without the rows that pad its vocabulary for tensor parallel ranks: no token has them."""

    def __init__(self, source: Source) -> None:
        model = ModelConfig.from_flags(source.flags).unpadded()
        super().__init__(
            source.directory, source.flags | {"padded_vocab_size": model.padded_vocab_size}, None
        )
        self._reader, self.kind, self.iteration = source, source.kind, source.iteration
        self.attention, self.segments = source.attention, source.segments
        self.names, self.finish, self.sidecars = source.names, source.finish, source.sidecars  # type: ignore[method-assign]
        self._shapes = {tensor.name: tensor.shape for tensor in catalog(self.flags)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor:
        return self._reader.read(name)[: self.shape(name)[0]]

    def origin(self, name: str) -> str:
        return self._reader.origin(name)


# ------------------------------------------------------------------------- opening


def open_source(
    path: Path | str, *, trust: bool = False, verify: bool = True, like: Path | str | None = None
) -> Source:
    """Find out what a directory holds, check its files against its manifest, and open it.

    Args:
        path: a store (`DIR/iter_0000010`, …, of which the newest is taken), one checkpoint of it, a Hugging
            Face model, its folder in the Hub's cache, or a directory with one file per rank.
        trust: read pickles that could run code.
        verify: compare every file with its size and hash in the manifest, where there is one, before a tensor
            of it is used; `finish` completes that.
        like: for rank files without a manifest, as a DeepSpeed run leaves them: a directory of rank files with
            a manifest, whose model and layout they have.

    Raises:
        HelixError: no checkpoint, or a damaged one; names the file.
    """
    directory = Path(path)
    resolved(directory)
    if not directory.is_dir():
        problem = "is a file" if directory.exists() else "does not exist"
        raise HelixError(f"{directory} {problem}. Give the directory of a checkpoint.")
    directory = snapshot_of(directory)
    kind = kind_of(directory)
    if kind == "canonical":
        directory = Store(directory).resolve()
    manifest = None
    if manifests.has_manifest(directory):
        manifest = manifests.read_manifest(directory)
        kind = manifest.kind
        if verify:
            # Canonical files of tensors are verified just before they are read.
            later = DATA if kind == "canonical" else ()
            manifests.verify(directory, only=lambda name: not name.endswith(later))
    if kind == "canonical":
        return CanonicalSource(directory, manifest, trust=trust, verify=verify)
    if kind == "huggingface":
        return HuggingFaceSource(directory, manifest)
    if manifest is None:
        if like is None:
            raise HelixError(
                f"{directory} has one file per rank and no manifest ({manifests.MANIFEST_NAME}), so its model "
                "and layout are not known. Give --like DIR, a directory that this converter wrote for the same "
                "layout."
            )
        resolved(like)
        manifest = manifests.read_manifest(like)
    return RankSource(directory, manifest, trust=trust)


def kind_of(directory: Path) -> str:
    """`canonical`, `huggingface` or `ranks`, by the names of the files.

    Raises:
        HelixError: neither.
    """
    if any((directory / name).exists() for name in (METADATA_NAME, "common.pt")):
        return "canonical"
    if any(directory.glob("iter_*")) or (directory / "release").is_dir():
        return "canonical"
    if any(rank_directory(directory).glob("mp_rank_*_model_states.pt")):
        return "ranks"
    weights = (INDEX, WEIGHTS, "config.json")
    if any((directory / name).exists() for name in weights) or any(directory.glob("*.safetensors")):
        return "huggingface"
    if manifests.has_manifest(directory):
        return manifests.read_manifest(directory).kind
    if (directory / LATEST).exists():
        raise HelixError(f"{directory / LATEST} names a directory without rank files.")
    raise HelixError(
        f"{directory} is no checkpoint that can be converted. Valid: a directory of Megatron checkpoints "
        "(iter_0000010, …), one of them, a Hugging Face model (config.json and safetensors files), or files "
        "per rank (latest, mp_rank_00_model_states.pt)."
    )


def layout_of(manifest: Manifest) -> RankLayout:
    """The layout of rank files.

    Raises:
        HelixError: the manifest is of another kind of checkpoint, or has no such layout.
    """
    layout = manifest.layout
    if manifest.kind != "ranks":
        raise HelixError(f"the manifest is of a {manifest.kind} checkpoint, not of files per rank.")
    for key in ("tp", "pp", "ep", "etp", "m", "vocabulary_multiple"):
        value = layout.get(key)
        if type(value) is not int or not 1 <= value <= MOST_RANKS:
            raise HelixError(
                f"the manifest's layout has {key} = {value!r:.80}. It must be a whole number from 1 to "
                f"{MOST_RANKS:,}."
            )
    helix = HelixConfig(
        layout["m"], manifest.attention, query_layout=layout.get("query_layout", "auto")
    )
    return RankLayout(
        manifest.model,
        layout["tp"],
        layout["pp"],
        layout["ep"],
        layout["etp"],
        helix,
        layout["vocabulary_multiple"],
    )


def stock_flags(directory: Path, *, trust: bool = False) -> dict[str, Any]:
    """Model flags of a checkpoint that Megatron-LM wrote, from the arguments that it keeps.

    Raises:
        HelixError: there are none.
    """
    common = load_common(directory, trust=trust)
    kept = common.get("args") if isinstance(common, dict) else None
    arguments = vars(kept) if isinstance(kept, argparse.Namespace) else {}
    if "num_layers" not in arguments:
        raise HelixError(
            f"{directory} has no arguments of Megatron-LM, so the model's sizes are not known. Save the "
            "checkpoint with Megatron-LM or with this package's training script."
        )
    names = (*FUNCTION_FLAGS, *OTHER_FLAGS)
    flags = {name: arguments[name] for name in names if name in arguments}
    if arguments.get("tokenizer_type") == "NullTokenizer" and type(flags.get("vocab_size")) is int:
        flags["vocab_size"] += 1  # Megatron adds a token that ends documents
    if "add_bias_linear" in arguments:
        flags["disable_bias_linear"] = not arguments["add_bias_linear"]
    window = flags.get("window_size")
    if isinstance(window, tuple | list) and window:  # before the query, and after it
        flags["window_size"] = window[0]
    return complete(flags)
