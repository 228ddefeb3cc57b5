"""How a run differs from the one whose checkpoint it goes on from. Starts without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from blake3 import blake3

from helix_megatron.data.text import default_text, read_text
from helix_megatron.errors import HelixError
from helix_megatron.run.config import RunConfig

# What Megatron's scheduler stores: the flag it comes from, and what it was called in older checkpoints.
SCHEDULE: dict[str, tuple[str, tuple[str, ...]]] = {
    "max_lr": ("--lr", ("start_lr",)),
    "min_lr": ("--min-lr", ()),
    "lr_warmup_steps": ("--lr-warmup-iters", ("warmup_iter", "warmup_steps")),
    "lr_decay_steps": ("--lr-decay-iters", ("end_iter", "decay_steps")),
    "lr_decay_style": ("--lr-decay-style", ("decay_style",)),
    "start_wd": ("--weight-decay", ()),
    "end_wd": ("the final weight decay", ()),
    "wd_incr_style": ("the style of the weight decay", ()),
    "wd_incr_steps": ("--train-iters", ()),
}
BATCH = "--global-batch-size"


def check_schedule(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], their_batch: int | None, our_batch: int
) -> None:
    """Refuse a checkpoint with another schedule of learning rate and weight decay.

    Megatron compares by assertions, which `python -O` leaves out, and counts in samples.

    Args:
        theirs, ours: states of the scheduler.
        their_batch, our_batch: samples of an iteration; None where the checkpoint does not tell.
    """
    differences = {}
    for name, (flag, older) in SCHEDULE.items():
        stored = next((theirs[key] for key in (*older, name) if key in theirs), ours[name])
        if stored != ours[name]:
            differences[flag] = (stored, ours[name], name.endswith("_steps"))
    if not differences:
        return
    counts_samples = their_batch is not None
    lines = []
    if counts_samples and their_batch != our_batch:
        lines.append(f"{BATCH} is {their_batch} there and {our_batch} here")
    for flag, (stored, own, is_length) in differences.items():
        iterations = is_length and counts_samples
        there, here = (stored / their_batch, own / our_batch) if iterations else (stored, own)
        if there != here:
            lines.append(f"{flag} is {_short(there)} there and {_short(here)} here")
    raise HelixError(
        f"the learning-rate schedule differs from the checkpoint's: {'; '.join(lines)}. Give the same, or "
        "--override-opt-param-scheduler to take this command's, or --use-checkpoint-opt-param-scheduler to "
        "take the checkpoint's."
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def data_facts(run: RunConfig) -> dict[str, Any]:
    """What decides which samples a run sees, by flags; JSON values, as a manifest keeps them."""
    return {
        "--seed": run.training.seed,
        BATCH: run.global_batch_size,
        "--seq-length": run.model.seq_length,
        "--split": run.data.split,
        "the data": _described_data(run),
    }


def _described_data(run: RunConfig) -> str:
    """By content where that is cheap, else by name and size: data that were only moved are the same."""
    data = run.data
    if not data.data_path:
        text = read_text(data.text) if data.text else default_text()
        return f"a text of {len(text)} bytes (BLAKE3 {blake3(text).hexdigest()[:12]}…)"
    parts = [_described_file(part, ".bin") for part in data.data_path]
    if data.tokenizer_model:
        parts.append(f"tokenizer {_described_file(data.tokenizer_model)}")
    return " ".join(parts)


def _described_file(path: str, suffix: str = "") -> str:
    try:
        return f"{os.path.basename(path)} ({os.path.getsize(path + suffix)} bytes)"
    except OSError:
        return path  # a weight, for one


def differing_data(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], consumed_samples: int
) -> str | None:
    """A sentence on what differs from the run that saved, and where in the data this one goes on.

    Args:
        theirs, ours: of `data_facts`; what an older checkpoint does not tell is not compared.
        consumed_samples: how many samples have been seen.
    """
    lines = [
        f"{name} {'are' if name == 'the data' else 'is'} {theirs[name]} there and {value} here"
        for name, value in ours.items()
        if theirs.get(name, value) != value
    ]
    if not lines:
        return None
    return (
        f"Warning: this run differs from the checkpoint's: {'; '.join(lines)}. Data do not begin anew: "
        f"the first {consumed_samples} samples in this run's order are passed over. With --finetune they begin "
        "anew, and so do iterations and the optimizer."
    )
