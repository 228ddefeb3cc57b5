"""What a DeepSpeed checkpoint of a cut model must say beyond what DeepSpeed writes: how it is cut.

DeepSpeed's files hold each rank's parts under the names of whole weights. Two layouts of the same number of
ranks give parts of the same shapes, so loading one as the other would go unnoticed. A file
`helix_parts.json` beside them says which it is.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from helix_megatron.checkpoint.foreign import damaged, is_plain_name, read_json, read_name
from helix_megatron.core.layout import contiguous_runs
from helix_megatron.deepspeed.models import CutModel
from helix_megatron.errors import HelixError

FILE = "helix_parts.json"
CONVERTED = "helix.json"  # the manifest of scripts/convert_checkpoint.py
FORMAT = 1
ENTRIES = {"host": str, "layout": dict, "block": dict, "cuts": list, "parameters": dict}
MOST_RANKS = 10**6


def guard_checkpoints(engine: Any, cut: CutModel) -> None:
    """Have an engine write `helix_parts.json` with each checkpoint, and read it before loading one.

    `load_checkpoint` then raises `HelixError` for a checkpoint that is cut in another way, or that does not say
    how. `save_16bit_model`, which would write one rank's parts as if they were the model, is refused.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint
    manifest = describe(cut)

    def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        directory = Path(save_dir) / str(
            tag if tag is not None else f"global_step{engine.global_steps}"
        )
        if engine.global_rank == 0:  # before DeepSpeed's files: no checkpoint is ever without it
            directory.mkdir(parents=True, exist_ok=True)
            (directory / FILE).write_text(json.dumps(manifest))
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(load_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        directory = find_checkpoint(load_dir, tag, missing_ok=True)
        if directory is not None:  # DeepSpeed itself says that there is nothing to load
            converted = converted_layout(Path(load_dir), directory)
            if converted is None:
                check_same(read_manifest(directory), manifest, directory)
            else:
                check_converted(converted, cut, directory)
        return load(load_dir, tag, *args, **kwargs)

    def save_16bit_model(*args: Any, **kwargs: Any) -> None:
        raise HelixError(
            "save_16bit_model would write one rank's part of every weight. Call "
            "helix_megatron.huggingface.save_pretrained(engine.module, directory) on every rank, or merge a "
            "checkpoint with python -m helix_megatron.deepspeed.merge."
        )

    save_checkpoint.__doc__, load_checkpoint.__doc__ = save.__doc__, load.__doc__
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    engine.save_16bit_model = engine.save_fp16_model = save_16bit_model


def describe(cut: CutModel) -> dict[str, Any]:
    """The manifest: how the model is cut, and where each part of each weight belongs."""
    kinds = {id(one): one for one in cut.parameters.values()}  # each shared by many weights
    numbers = {kind: number for number, kind in enumerate(kinds)}
    cuts = [
        {"dim": one.dim, "runs": [contiguous_runs(index) for index in one.indices]}
        for one in kinds.values()
    ]
    return {
        "format": FORMAT,
        **cut.description,
        "cuts": cuts,
        "parameters": {name: numbers[id(one)] for name, one in cut.parameters.items()},
    }


def indices_of(cut: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """What each rank holds of a dimension, int64, from a manifest's cut."""
    return tuple(
        np.concatenate([np.arange(start, start + length) for start, length in runs])
        for runs in cut["runs"]
    )


def find_checkpoint(
    directory: str | os.PathLike[str], tag: Any = None, *, missing_ok: bool = False
) -> Any:
    """The directory of one checkpoint: DIR/TAG, or the one that DIR/latest names.

    Raises:
        HelixError: there is none (None instead with `missing_ok`).
    """
    root = Path(directory)
    latest = root / "latest"
    if tag is None and os.path.lexists(latest):
        tag = read_name(latest, "Save the checkpoint again.")
        if not is_plain_name(tag):
            raise HelixError(f"{latest} names {tag[:40]!r}, which is no directory in {root}.")
    if tag is not None and (root / str(tag)).is_dir():
        return root / str(tag)
    if tag is None and (root / FILE).is_file():
        return root
    if missing_ok:
        return None
    have = sorted(path.name for path in root.glob("*/") if (path / FILE).is_file())
    raise HelixError(
        f"{root} holds no checkpoint {tag!r}. "
        + (
            f"Valid tags: {', '.join(have)}."
            if have
            else "Give the directory that was passed to engine.save_checkpoint."
        )
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint."""
    path = directory / FILE
    if not os.path.lexists(path):
        raise HelixError(
            f"{directory} has no {FILE}: it was not saved by an engine with a helix block, so nothing says "
            "which part of each weight a file holds. Load whole weights into the model before initialize "
            "instead."
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise HelixError(
            f"{path} has format {manifest.get('format')!r:.40}. Valid: {FORMAT}. Use the version that wrote it."
        )
    if problem := _problem(manifest):
        raise HelixError(damaged(path, problem))
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What readers rely on and a manifest does not give; None if it gives all."""
    for key, kind in ENTRIES.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing or of the wrong type"
    ranks, cuts = manifest["block"].get("tensor_parallel_size"), manifest["cuts"]
    if type(ranks) is not int or not 1 <= ranks <= MOST_RANKS:
        return f"tensor_parallel_size is {ranks!r:.40}"
    for number, cut in enumerate(cuts):
        if not _is_cut(cut, ranks):
            return f"cut {number} does not deal every position of a dimension once to {ranks} ranks"
    for name, number in manifest["parameters"].items():
        if type(number) is not int or not 0 <= number < len(cuts):
            return f"{name:.80} has the cut {number!r:.40} of {len(cuts)}"
    return None


def _is_cut(cut: Any, ranks: int) -> bool:
    """Whether this is a dimension, and runs of it, [start, length], for each rank."""
    if not isinstance(cut, dict) or type(cut.get("dim")) is not int or not 0 <= cut["dim"] < 8:
        return False
    by_rank = cut.get("runs")
    if not isinstance(by_rank, list) or len(by_rank) != ranks:
        return False
    if not all(runs and isinstance(runs, list) for runs in by_rank):
        return False
    runs = [run for runs in by_rank for run in runs]
    for run in runs:
        pair = isinstance(run, list) and len(run) == 2
        if not pair or not all(type(number) is int and number >= 0 for number in run):
            return False
    ends = [0, *itertools.accumulate(length for _, length in sorted(runs))]
    return [start for start, _ in sorted(runs)] == ends[:-1]


def converted_layout(root: Path, directory: Path) -> dict[str, Any] | None:
    """The layout of files that scripts/convert_checkpoint.py wrote for DeepSpeed; None of others."""
    if (directory / FILE).is_file() or not (root / CONVERTED).is_file():
        return None
    manifest = read_json(root / CONVERTED)
    layout = manifest.get("layout")
    return layout if manifest.get("kind") == "ranks" and isinstance(layout, dict) else None


def check_converted(saved: dict[str, Any], cut: CutModel, directory: Path) -> None:
    """Raises `HelixError` if converted files are not of this model's layout."""
    if cut.host != "megatron-core":
        raise HelixError(
            f"{directory} was converted for megatron-core models, and this is a {cut.host} model. Convert "
            "to Hugging Face files, and load those before initialize."
        )
    layout = cut.layout
    own = {"tp": layout.num_ranks, "m": layout.segments, "query_layout": layout.query_layout}
    for name, value in own.items():
        if saved.get(name) != value:
            raise HelixError(
                f"{directory} was converted for {name} {saved.get(name)!r}, and this model has {value!r}. "
                "Convert it again with scripts/convert_checkpoint.py --to ranks."
            )


def check_same(saved: dict[str, Any], own: dict[str, Any], directory: Path) -> None:
    """Raises `HelixError` if a checkpoint is cut in another way than this engine's model."""
    if saved["host"] != own["host"]:
        raise HelixError(
            f"{directory} is of a {saved['host']} model, and this is a {own['host']} model."
        )
    for what in ("layout", "block"):
        names = own[what] if what == "layout" else ("mlp", "embeddings")
        for name in names:
            if saved[what].get(name) != own[what][name]:
                raise HelixError(
                    f"{directory} was saved with {name} {saved[what].get(name)!r}, and this model has "
                    f"{own[what][name]!r}: its parts are others. Use the same block, or merge the checkpoint "
                    "into whole weights (python -m helix_megatron.deepspeed.merge) and begin from those."
                )
