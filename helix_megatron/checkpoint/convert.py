"""Convert a checkpoint: Hugging Face, canonical, or one file per rank, in any direction.

One tensor is in memory at a time. The result is written beside the target and renamed into place when it is
complete; an interrupted conversion goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.catalog import QUALITY
from helix_megatron.checkpoint.durable import sync_directories, writing_errors
from helix_megatron.checkpoint.foreign import resolved
from helix_megatron.checkpoint.huggingface_io import same_bits
from helix_megatron.checkpoint.huggingface_target import HuggingFaceTarget
from helix_megatron.checkpoint.manifest import FileEntry
from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.checkpoint.source import SegmentLocalSource, Source, UnpaddedSource
from helix_megatron.checkpoint.sources import open_source
from helix_megatron.checkpoint.staging import Staging, check_target
from helix_megatron.checkpoint.targets import CanonicalTarget, RankTarget, Row, Target, Tensors
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, Setting, listed, with_settings

KINDS = ("canonical", "huggingface", "ranks")
SHARD_SIZE = 5 * 10**9
CANONICAL_SHARD_SIZE = 250 * 10**6  # smaller: they are hashed in parallel before they are read
FORMAT = 2  # of the conversion's own output; work that another version began starts afresh
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankOptions:
    """Of files per rank: the layout, by the names of `RankLayout`, and the name of the directory."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None
    helix: HelixConfig = field(default_factory=HelixConfig)
    vocabulary_multiple: int = 1
    tag: str = "global_step0"


@dataclass(frozen=True)
class Options:
    """Of a conversion.

    Args:
        ranks: layout, for files per rank.
        dtype: `fp32`, `fp16` or `bf16` for all weights; None leaves them as they are.
        shard_size: largest size of a file in bytes, one tensor excepted. None makes Hugging Face files again
            as the weights came from them, and otherwise takes 5 GB; canonical files then have 250 MB.
        segments: convert ordinary weights to `segment-local` attention of so many segments.
        allow_quality_loss: the user knows what `segments` does.
        verify: read the result back, and compare it with the source bit for bit.
        verify_source: check the source's files against its manifest first.
        trust: read pickles that could run code.
        overwrite: replace the target once the new one is complete.
        resume: go on with what an interrupted conversion has finished.
        like: see `sources.open_source`.
    """

    ranks: RankOptions = field(default_factory=RankOptions)
    dtype: str | None = None
    shard_size: int | None = None
    segments: int | None = None
    allow_quality_loss: bool = False
    verify: bool = False
    verify_source: bool = True
    trust: bool = False
    overwrite: bool = False
    resume: bool = True
    like: Path | None = None


def convert(
    source: Path | str,
    target: Path | str,
    to: str,
    options: Options | None = None,
    *,
    dry_run: bool = False,
    out: TextIO | None = None,
) -> Path | None:
    """Convert the checkpoint in `source` to one in `target`.

    A canonical target is a store with its one checkpoint in `TARGET/release`, which `load` of the
    training script and of stock Megatron-LM loads (weights only; training begins at iteration 0).

    Args:
        source: any kind of checkpoint, see `sources.open_source`.
        target: a directory that does not exist.
        to: `canonical`, `huggingface` or `ranks`.
        options: see `Options`.
        dry_run: print what would be written, and write nothing.
        out: where the table, progress and warnings go; standard output when None.

    Returns:
        The target; None of a dry run.

    Raises:
        HelixError: settings that do not fit, a damaged source, a target that exists, a full disk. The target
            is as before.
    """
    options, out = options or Options(), out or sys.stdout
    if to not in KINDS:
        raise HelixError(f"a checkpoint cannot be converted to {to!r}. Valid: {listed(KINDS)}.")
    target_path = Path(target)
    _check_paths(Path(source), target_path)
    if not dry_run:
        check_target(target_path, options.overwrite)
    opened = open_source(
        source,
        trust=options.trust,
        verify=options.verify_source,
        like=options.like,
        dtype=_dtype(options.dtype),
    )
    say = partial(print, file=out, flush=True)
    if opened.packing:
        say(f"Weights are read from {opened.packing} and kept in {options.dtype or 'bf16'}.")
    if options.segments is not None:
        opened = _segment_local(opened, options)
        say(f"Warning: {QUALITY}.")
    made = make_target(opened, to, options)
    if dry_run:
        opened.finish()
        say(table(made.rows()))
        return None
    staging = Staging(
        target_path,
        _identity(opened, made, to, options),
        overwrite=options.overwrite,
        resume=options.resume,
        say=say,
    )
    try:
        with writing_errors(target_path):
            _write(made, staging, out)
            opened.finish()
            if options.verify:
                _verify(made, staging.content, out)
                say("Verified: what was written equals the source, bit for bit.")
            return staging.publish()
    finally:
        staging.close()


def make_target(source: Source, to: str, options: Options) -> Target:
    """What `convert` writes to, before anything is written."""
    if to == "huggingface":
        source = UnpaddedSource(source)
    tensors = Tensors(source, _dtype(options.dtype))
    if options.shard_size is not None and options.shard_size < 1:
        raise HelixError(
            f"files of {options.shard_size} bytes hold nothing.",
            remedy=("Try ", Setting("shard_size", "5GB"), "."),
        )
    if to == "canonical":
        return CanonicalTarget(tensors, options.shard_size or CANONICAL_SHARD_SIZE)
    if to == "huggingface":
        return HuggingFaceTarget(tensors, options.shard_size, SHARD_SIZE)
    sizes = dict(vars(options.ranks))
    tag, helix = sizes.pop("tag"), sizes.pop("helix")
    if source.attention == "segment-local":
        m = helix.intra_head_parallel_size
        if m not in (1, source.segments):
            raise HelixError(
                f"the checkpoint has segment-local attention of {source.segments} segments, which cannot "
                f"become {m}.",
                remedy=("Give ", Setting("intra_head_parallel_size", source.segments), "."),
            )
        helix = HelixConfig(source.segments, "segment-local")
        helix.head_groups(sizes["tensor"])  # raises where m does not divide the ranks
    return RankTarget(tensors, RankLayout(source.flags, helix=helix, **sizes), tag)


def table(rows: Iterable[Row]) -> str:
    """Every tensor of a result with shape, dtype, origin and file, and the totals."""
    rows = list(rows)
    lines = [("tensor", "shape", "dtype", "from", "file")]
    lines += [
        (
            row.name,
            "×".join(map(str, row.shape)) or "scalar",
            str(row.dtype).removeprefix("torch."),
            row.origin,
            row.file,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    files = {row.file for row in rows}
    total = sum(row.nbytes for row in rows)
    largest = max(row.nbytes for row in rows)
    text.append(
        f"{len(rows)} tensors in {len(files)} files, {total:,} bytes; the largest tensor has {largest:,}."
    )
    return "\n".join(text)


# ------------------------------------------------------------------------- steps


def _check_paths(source: Path, target: Path) -> None:
    inside, outside = resolved(target), resolved(source)
    if inside == outside or outside in inside.parents or inside in outside.parents:
        raise HelixError(
            f"the target {target} and the source {source} lie in each other. Give another target."
        )


def _segment_local(source: Source, options: Options) -> Source:
    if source.attention == "segment-local":
        raise HelixError(
            f"the source is segment-local already, with {source.segments} segments.",
            remedy=("Convert it without another change of its attention.",),
        )
    if not options.allow_quality_loss:
        remedy = with_settings("To convert all the same, add <allow_quality_loss>.")
        raise HelixError(f"{QUALITY}.", remedy=remedy)
    assert options.segments is not None
    if options.segments < 2:
        raise HelixError(
            (Setting("segments", options.segments), " cuts no head."),
            remedy=("Give at least 2, or leave its attention exact.",),
        )
    return SegmentLocalSource(source, options.segments)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    if name not in DTYPES:
        raise HelixError(f"dtype {name!r} is unknown. Valid: {listed(DTYPES)}.")
    return DTYPES[name]


def _identity(source: Source, target: Target, to: str, options: Options) -> dict[str, Any]:
    """What the result depends on: source files by name, size and time, and settings."""
    files = [
        [
            path.relative_to(source.directory).as_posix(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        ]
        for path in sorted(source.directory.rglob("*"))
        if path.is_file()
    ]
    settings = replace(options, verify=False, verify_source=True, overwrite=False, resume=True)
    plan = [repr(row) for row in target.rows()]
    return {
        "format": FORMAT,
        "source": str(source.directory.resolve()),
        "to": to,
        "settings": repr(settings),
        "files": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "plan": hashlib.sha256("\n".join(plan).encode()).hexdigest(),
    }


def _write(target: Target, staging: Staging, out: TextIO) -> None:
    sizes: dict[str, int] = {}
    for row in target.rows():
        sizes[row.file] = sizes.get(row.file, 0) + row.nbytes
    with _progress("converting", sum(sizes.values()), out) as bar:
        for unit in target.units:
            if unit in staging.records:  # by an earlier conversion
                bar.total -= sum(sizes[file] for file in staging.records[unit]["files"])
            else:
                staging.record(unit, target.write(unit, staging.content, bar.update))
    _complete(target, staging.content, staging.records)


def _complete(target: Target, content: Path, records: Mapping[str, dict[str, Any]]) -> None:
    manifest = target.finish(content, records)
    main = content / target.main
    known: dict[str, Any] = {
        (content / name).relative_to(main).as_posix(): FileEntry.from_json(entry)
        for record in records.values()
        for name, entry in record["files"].items()
    }
    for path in sorted(main.rglob("*")):
        name = path.relative_to(main).as_posix()
        own = (manifests.MANIFEST_NAME, manifests.CHECKSUM_NAME)
        if path.is_file() and name not in known and name not in own:
            known[name] = manifests.digest(path)
    for path in content.iterdir():
        if path.is_file() and main != content:
            manifests.digest(path)  # synced
    sync_directories(content)
    manifests.write_manifest(main, replace(manifest, files=known))


def _verify(target: Any, content: Path, out: TextIO) -> None:
    """Read the result back and compare it with the source."""
    written, tensors = open_source(content, verify=True), target.tensors
    if set(written.names) != set(tensors.dtypes):
        raise HelixError(
            "the result holds other tensors than the source. This is a fault of the converter."
        )
    total = sum(
        torch.Size(written.shape(name)).numel() * written.dtype(name).itemsize
        for name in written.names
    )
    with _progress("verifying", total, out) as bar:
        for name in written.names:
            value = written.read(name)
            if not same_bits(value, tensors.read(name)):
                raise HelixError(
                    f"{name} differs between what was written and the source. Either a disk or memory is "
                    "faulty, or the source has changed meanwhile. Nothing was put in place; convert again."
                )
            bar.update(value.nbytes)
    written.finish()


def _progress(verb: str, total: int, out: TextIO) -> tqdm[Any]:
    """A bar in bytes; where nobody watches it is renewed only now and then."""
    every = 0.1 if out.isatty() else 10.0
    return tqdm(
        desc=verb, total=total, unit="B", unit_scale=True, file=out, mininterval=every, miniters=1
    )
