"""What a conversion reads: a checkpoint is looked at, checked and opened as a `Source`."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.canonical_io import DATA, METADATA_NAME, CanonicalReader
from helix_megatron.checkpoint.foreign import read_json, resolved
from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    WEIGHTS,
    make_index,
    snapshot_of,
)
from helix_megatron.checkpoint.manifest import Manifest
from helix_megatron.checkpoint.packed import open_weights
from helix_megatron.checkpoint.partition import MANIFEST_KEYS, RankLayout
from helix_megatron.checkpoint.rank_io import LATEST, RankReader, rank_directory
from helix_megatron.checkpoint.safe import load_common
from helix_megatron.checkpoint.source import Source, side_files
from helix_megatron.checkpoint.store import Store
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, with_settings
from helix_megatron.model.description import FUNCTION_FLAGS, complete
from helix_megatron.model.families import family_of
from helix_megatron.model.families.rules import Rule, canonical_tensor
from helix_megatron.model.families.towers import is_tower, text_config

MOST_RANKS = 10**6  # in each direction
OTHER_FLAGS = (
    "group_query_attention",
    "vocab_size",
    "padded_vocab_size",
    "seq_length",
    "make_vocab_size_divisible_by",
)


class HuggingFaceSource(Source):
    """A directory as transformers' `save_pretrained` writes it, or with weights in blocks of fp8 or in MXFP4.

    Args:
        directory: of config.json and safetensors.
        dtype: of packed weights, once unpacked; bfloat16 when None.

    Raises:
        HelixError: no such directory, or weights that are not those of its config.json: this is told before the
            first tensor is converted, not hours later.
    """

    kind = "huggingface"

    def __init__(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        config = read_json(directory / "config.json")
        self._files = open_weights(directory, dtype)
        self.packing = str(self._files.packing or "")
        text = text_config(config)
        family = family_of(text)
        super().__init__(directory, family.model_flags(text))
        rules = family.rules(self.flags, self._files.names, tower=is_tower(config))
        self._rules: dict[str, Rule] = {rule.name: rule for rule in rules}
        assert self.tensors.keys() == self._rules.keys(), "the family's rules are the catalog's"
        for rule in rules:
            for name, shape in zip(rule.sources, rule.shapes, strict=True):
                actual = self._files.entry(name).shape
                if actual != tuple(shape):
                    raise HelixError(
                        f"tensor {name} of {directory / self._files.file(name)} has shape {list(actual)}, and "
                        f"config.json makes it {list(shape)}. Check that config.json is this model's."
                    )

    def dtype(self, name: str) -> torch.dtype:
        dtypes = {self._files.entry(source).dtype for source in self._rules[name].sources}
        if len(dtypes) > 1 and all(dtype.is_floating_point for dtype in dtypes):
            return torch.float64 if torch.float64 in dtypes else torch.float32  # holds all others
        return functools.reduce(torch.promote_types, dtypes)

    def read(self, name: str) -> Tensor:
        dtype = self.dtype(name)
        return canonical_tensor(self._rules[name], lambda *part: self._files.read(*part).to(dtype))

    def mixed(self, name: str) -> str | None:
        first, *others = ((s, self._files.entry(s).dtype) for s in self._rules[name].sources)
        other = next((pair for pair in others if pair[1] != first[1]), None)
        return None if other is None else f"{other[0]} is {other[1]} and {first[0]} is {first[1]}"

    def origin(self, name: str) -> str:
        rule = self._rules[name]
        place = "" if rule.place is None else f"[{rule.place}]"
        return ", ".join(source + place for source in rule.sources)

    def sidecars(self) -> dict[str, bytes | Path]:
        index: dict[str, bytes | Path] = {INDEX: make_index(self._files.files)}
        files = side_files(self.directory)
        return files | index if self.packing else index | files  # that of packed files names scales


# ------------------------------------------------------------------------- opening


def open_source(
    path: Path | str,
    *,
    trust: bool = False,
    verify: bool = True,
    like: Path | str | None = None,
    dtype: torch.dtype | None = None,
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
        dtype: see `HuggingFaceSource`.

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
    source: Source
    if kind == "canonical":
        flags = stock_flags(directory, trust=trust) if manifest is None else manifest.model
        entries = manifest.files if verify and manifest is not None else {}
        unverified = {name: entry for name, entry in entries.items() if name.endswith(DATA)}
        source = CanonicalReader(directory, flags, trust=trust, unverified=unverified)
    elif kind == "huggingface":
        source = HuggingFaceSource(directory, dtype)
    else:
        if manifest is None:
            if like is None:
                raise HelixError(
                    f"{directory} has one file per rank and no manifest ({manifests.MANIFEST_NAME}), so its "
                    "model and layout are not known.",
                    remedy=with_settings(
                        "Give <like>, a directory that this converter wrote for the same layout."
                    ),
                )
            resolved(like)
            manifest = manifests.read_manifest(like)
        source = RankReader(directory, layout_of(manifest), trust=trust)
    if manifest is not None:
        source.attention, source.segments = manifest.attention, manifest.segments
        source.iteration = manifest.iteration
    return source


def kind_of(directory: Path) -> str:
    """`canonical`, `huggingface` or `ranks`, by the names of the files."""
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
        f"{directory} is no checkpoint that can be read. Valid: a directory of Megatron checkpoints "
        "(iter_0000010, …), one of them, a Hugging Face model (config.json and safetensors files), or files "
        "per rank (latest, mp_rank_00_model_states.pt)."
    )


def layout_of(manifest: Manifest) -> RankLayout:
    """The layout of rank files."""
    layout = manifest.layout
    if manifest.kind != "ranks":
        raise HelixError(f"the manifest is of a {manifest.kind} checkpoint, not of files per rank.")
    for key in (*MANIFEST_KEYS, "m"):
        value = layout.get(key)
        if type(value) is not int or not 1 <= value <= MOST_RANKS:
            raise HelixError(
                f"the manifest's layout has {key} = {value!r:.80}. It must be a whole number from 1 to "
                f"{MOST_RANKS:,}."
            )
    helix = HelixConfig(
        layout["m"], manifest.attention, query_layout=layout.get("query_layout", "auto")
    )
    sizes = {name: layout[key] for key, name in MANIFEST_KEYS.items()}
    return RankLayout(manifest.model, helix=helix, **sizes)


def stock_flags(directory: Path, *, trust: bool = False) -> dict[str, Any]:
    """Model flags of a checkpoint that Megatron-LM wrote, from the arguments that it keeps."""
    common = load_common(directory, trust=trust)
    kept = common.get("args") if isinstance(common, dict) else None
    arguments = vars(kept) if isinstance(kept, argparse.Namespace) else {}
    if "num_layers" not in arguments:
        raise HelixError(
            f"{directory} has no arguments of Megatron-LM, so the model's sizes are not known. Save the "
            "checkpoint with Megatron-LM or with this package's training script."
        )
    if variant := arguments.get("experimental_attention_variant"):
        raise HelixError(
            f"{directory} holds a model with experimental_attention_variant = {variant!r}. Megatron-LM stores "
            "the norms inside gated delta nets less 1 with apply_layernorm_1p, and the other variants are "
            "not described here. Only checkpoints that this package wrote can be read with it."
        )
    arguments = with_latents(arguments)
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        if pattern := arguments.get(name):
            raise HelixError(
                f"{directory} holds a model with {name} = {pattern!r:.80}. Megatron-LM describes its Mamba "
                "heads by other arguments. Only checkpoints that this package wrote can be read with it."
            )
    names = (*FUNCTION_FLAGS, *OTHER_FLAGS)
    flags = {name: arguments[name] for name in names if arguments.get(name) is not None}
    if arguments.get("tokenizer_type") == "NullTokenizer" and type(flags.get("vocab_size")) is int:
        flags["vocab_size"] += 1  # Megatron adds a token that ends documents
    if "add_bias_linear" in arguments:
        flags["disable_bias_linear"] = not arguments["add_bias_linear"]
    window = flags.get("window_size")
    if isinstance(window, tuple | list) and window:  # before the query, and after it
        flags["window_size"] = window[0]
    return complete(flags)


def with_latents(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Megatron-LM in which latent attention is described as other attention is.

    What they leave out is the default of its `MLATransformerConfig`. Others are returned as they are.

    Raises:
        HelixError: scores are scaled by yarn's `mscale_all_dim` without yarn.
    """
    if not arguments.get("multi_latent_attention"):
        return dict(arguments)
    given = {name: value for name, value in arguments.items() if value is not None}
    kind, positions = given.get("rope_type", "yarn"), given.get("position_embedding_type")
    own = {"kv_channels": given.get("v_head_dim", 128), "yarn_correction_range_round_to_int": True}
    if positions in ("rope", "yarn", "none"):  # its layers rotate by themselves
        own["position_embedding_type"] = kind
    for name, default in (
        ("rotary_scaling_factor", 40.0),
        ("original_max_position_embeddings", 4096),
        ("beta_fast", 32.0),
        ("beta_slow", 1.0),
        ("mscale", 1.0),
        ("mscale_all_dim", 0.0),
    ):
        own[f"yarn_{name}"] = given.get(name, default)
    if kind == "rope" and own["yarn_rotary_scaling_factor"] != 1 and own["yarn_mscale_all_dim"]:
        raise HelixError(
            f"its arguments have rope_type rope with rotary_scaling_factor "
            f"{own['yarn_rotary_scaling_factor']} and mscale_all_dim {own['yarn_mscale_all_dim']}, by which "
            "Megatron scales scores without yarn. Such models cannot be described here."
        )
    return {**arguments, **own}
