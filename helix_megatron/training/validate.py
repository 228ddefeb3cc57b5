"""Everything that can be known to be wrong before any rank starts to compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from helix_megatron.checkpoint.store import Store
from helix_megatron.core.exchanges import choose
from helix_megatron.data.megatron_datasets import check_data_path, check_document_ends
from helix_megatron.data.text import (
    ByteDataset,
    build_tokenizer,
    check_order,
    default_text,
    parse_split,
    read_text,
    split_text,
)
from helix_megatron.errors import HelixError
from helix_megatron.run.config import RunConfig
from helix_megatron.training.checkpoint_flags import check_checkpoint, find_checkpoint

BYTES = 256  # the vocabulary without a tokenizer


def validate(values: Mapping[str, Any], world_size: int) -> RunConfig:
    """The run that flags describe, checked against the files they name.

    Args:
        values: by the destination names of the training script's flags, as of `arguments.parse_args`.

    Raises:
        HelixError: with the values, the valid values and what to try.
    """
    run = RunConfig.from_values(values, world_size)
    _check_experts(run)
    run = run.with_vocabulary(_check_data(run))
    if run.checkpoints.save:
        Store(run.checkpoints.save).check_writable()
    path = find_checkpoint(run.checkpoints)
    if path is not None:
        iteration = check_checkpoint(run, path)
        checkpoints = dataclasses.replace(
            run.checkpoints, load_path=str(path), load_iteration=iteration
        )
        run = dataclasses.replace(run, checkpoints=checkpoints)
    if run.helix.active and run.helix.attention == "exact":
        choose(run.attention_shape, run.helix.exchange)
    return run


def _check_experts(run: RunConfig) -> None:
    """Copies of experts are right in inference, and lose gradients in training."""
    parallel = run.parallel
    tensor, inside = parallel.tensor_model_parallel_size, parallel.expert_tensor_parallel_size
    if (
        not run.model.num_experts
        or parallel.expert_model_parallel_size > 1
        or inside in (None, tensor)
    ):
        return
    dealt = math.gcd(run.model.num_experts, tensor)
    deal = f", or deal whole ones: --expert-model-parallel-size {dealt}" if dealt > 1 else ""
    raise HelixError(
        f"--expert-tensor-parallel-size {inside} makes copies of every expert on {tensor} tensor parallel "
        "ranks, and Megatron does not sum their gradients. Leave it out to cut experts, with "
        f"--disable-bias-linear{deal}."
    )


def _check_data(run: RunConfig) -> int:
    """The number of tokens of the data."""
    data, length = run.data, run.model.seq_length
    parse_split(data.split)
    check_order(length, run.training.seed)
    if not data.data_path:
        byte_datasets(run)
        return BYTES
    tokenizer = build_tokenizer(data.tokenizer_type, data.tokenizer_model)
    vocabulary = tokenizer.vocab_size
    check_data_path(data.data_path, vocabulary, length, run.samples, data.split)
    if data.packed_documents:
        check_document_ends(data.data_path, tokenizer.eod)
    return vocabulary


def byte_datasets(run: RunConfig) -> tuple[ByteDataset, ByteDataset | None]:
    """Training and validation text, without end; None where nothing is validated."""
    text = read_text(run.data.text) if run.data.text else default_text()
    train, valid, _ = split_text(text, run.data.split)
    size, seed = run.model.seq_length, run.training.seed
    name = "the validation text"
    validation = ByteDataset(valid, size, seed, name=name) if run.samples[1] else None
    return ByteDataset(train, size, seed, name="the training text"), validation
