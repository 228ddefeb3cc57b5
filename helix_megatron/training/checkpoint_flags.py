"""What a checkpoint says about its model, against the settings of a run. Starts without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helix_megatron.checkpoint import catalog
from helix_megatron.checkpoint.manifest import Manifest, has_manifest, read_manifest
from helix_megatron.checkpoint.store import Store, is_same_directory
from helix_megatron.errors import HelixError
from helix_megatron.flags import flag_of
from helix_megatron.model.description import FREE_FLAGS, HEADS, MODEL_FLAGS, ModelConfig
from helix_megatron.run.config import RunConfig
from helix_megatron.run.settings import Checkpoints

QUALITY = (
    f"{catalog.QUALITY}. Expect to train on, or take --helix-attention exact, which loses nothing"
)


def find_checkpoint(checkpoints: Checkpoints) -> Path | None:
    """The directory that `--load` means; None where a run starts anew: without it, or with a fresh `--save`."""
    if not checkpoints.load:
        return None
    store, save, step = Store(checkpoints.load), checkpoints.save, checkpoints.ckpt_step
    restarted = save and is_same_directory(store.root, save)
    may_be_missing = restarted and step is None and not checkpoints.exit_on_missing_checkpoint
    if may_be_missing and store.is_unused():
        return None  # the first start of a job that is restarted with the same command
    return store.resolve(step)


def checkpoint_defaults(
    path: Path, *, attention: str, trust: bool, seq_length: int
) -> dict[str, Any]:
    """For `--use-checkpoint-args`: the model flags of a checkpoint, as defaults of the parser.

    A segment-local checkpoint is of a model with m times the heads; a run with the same m and
    `--helix-attention segment-local` gets the heads that it means. The longest sequence is the checkpoint's,
    but for a run with longer ones (`seq_length`) of a model whose positions are not learned.
    """
    manifest = read_manifest(path) if has_manifest(path) else None
    saved = stored_arguments(path, manifest, trust=trust)
    flags = {name: value for name, value in saved.items() if name in MODEL_FLAGS}
    flags.pop("seq_length", None)
    learned = flags.get("position_embedding_type") == "learned_absolute"
    if not learned and (flags.get("max_position_embeddings") or 0) < seq_length:
        flags.pop("max_position_embeddings", None)
    if manifest is not None and "segment-local" == manifest.attention == attention:
        m = manifest.segments
        run = ModelConfig.from_flags(manifest.model).joined_heads(m)
        flags |= {name: getattr(run, name) for name in HEADS}
        flags["intra_head_parallel_size"] = m
    return flags


def stored_arguments(path: Path, manifest: Manifest | None, *, trust: bool) -> dict[str, Any]:
    """Model flags and place in the data: from the manifest, else from the arguments that Megatron-LM saved."""
    from helix_megatron.checkpoint.safe import load_common  # needs torch
    from helix_megatron.checkpoint.sources import with_latents

    if manifest is not None:
        return manifest.model | manifest.extra
    common = load_common(path, trust=trust)
    arguments = with_latents(vars(common["args"])) if "args" in common else {}
    heads = arguments.get("num_attention_heads")
    if heads is not None and not arguments.get("group_query_attention"):
        arguments["num_query_groups"] = heads  # Megatron-LM leaves 1 there
    simple = (bool, int, float, str, list, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, simple)}


def converts_to_segment_local(run: RunConfig, saved: dict[str, Any]) -> bool:
    """Whether a segment-local run meets the checkpoint of an ordinary model with its number of heads."""
    if run.local_segments == 1:
        return False
    stored = {name: saved.get(name) for name in HEADS}
    return all(stored[name] in (getattr(run.model, name), None) for name in HEADS) and any(
        stored[name] not in (getattr(run.stored_model, name), None) for name in HEADS
    )


def check_checkpoint(run: RunConfig, path: Path) -> int:
    """Refuse a checkpoint of another model.

    Returns:
        The iteration at which the run goes on, as far as the manifest tells.
    """
    manifest = read_manifest(path) if has_manifest(path) else None
    checkpoints = run.checkpoints
    saved = stored_arguments(path, manifest, trust=checkpoints.trust_checkpoint)
    model = run.stored_model
    if converts_to_segment_local(run, saved):
        if not checkpoints.allow_quality_loss:
            raise HelixError(
                f"{path} holds ordinary weights, and this run has segment-local attention. {QUALITY}. To load "
                "them all the same, add --allow-quality-loss and --finetune."
            )
        model = run.model
    learned = model.position_embedding_type == "learned_absolute"
    free = FREE_FLAGS - {"max_position_embeddings"} if learned else FREE_FLAGS
    different = {
        name: (saved[name], value)
        for name, value in model.to_flags().items()
        if name in saved and name not in free and saved[name] != value
    } | _vocabulary(model, saved)
    if different:
        raise HelixError(_another_model(path, manifest, different))
    if manifest is None or checkpoints.finetune:
        return 0
    return manifest.iteration or 0


def _another_model(
    path: Path, manifest: Manifest | None, different: dict[str, tuple[Any, Any]]
) -> str:
    lines = [
        f"{flag_of(name)} is {theirs} there and {ours} here"
        for name, (theirs, ours) in sorted(different.items())
    ]
    hint = ""
    local = manifest is not None and manifest.attention == "segment-local"
    if local and not different.keys().isdisjoint(HEADS):
        m = manifest.segments  # type: ignore[union-attr]
        hint = (
            f" It was trained with segment-local attention of {m} segments: load it with "
            f"--helix-attention segment-local --intra-head-parallel-size {m}, or as an ordinary model with "
            "its number of heads."
        )
    return (
        f"{path} holds another model: {'; '.join(lines)}.{hint} Give the checkpoint's values, or "
        "--use-checkpoint-args to take them all."
    )


def _vocabulary(model: ModelConfig, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Padding may differ; the tokens may not. Megatron would load the rows that fit and say nothing."""
    if saved.get("vocab_size") is not None:
        if saved["vocab_size"] != model.vocab_size:
            return {"vocab_size": (saved["vocab_size"], model.vocab_size)}
    elif saved.get("padded_vocab_size") not in (None, model.padded_vocab_size):
        return {"vocab_size": (saved["padded_vocab_size"], model.padded_vocab_size)}
    return {}
