"""Train, valid and test of Megatron's `.bin/.idx` files.

Reading, shuffling and blending are megatron-core's (`IndexedDataset`, `GPTDataset`,
`BlendedMegatronDatasetBuilder`). This module adds the checks that turn a wrong file or setting into a
sentence; megatron-core asserts, or fails in the middle of training.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from helix_megatron.data.indexed_files import IndexSummary, check_indexed_dataset
from helix_megatron.data.text import SPLITS, Tokenizer, check_order, parse_split, split_bounds
from helix_megatron.errors import HelixError, listed


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Megatron's `--data-path`: (prefixes, weights). One prefix, several, or weight-prefix pairs.

    Raises:
        HelixError: nothing is given, a pair lacks its weight, or a weight is not positive.
    """
    from megatron.core.datasets.utils import get_blend_from_list

    if not data_path:
        raise HelixError("--data-path is empty. Give a prefix, or pairs of a weight and a prefix.")
    prefixes, weights = get_blend_from_list(list(data_path))
    if weights is None:
        # megatron-core means to refuse weights for some prefixes only, but takes them for prefixes.
        legal = len(prefixes) == 1 or not any(map(_is_number, prefixes))
    else:
        legal = all(0 < weight < float("inf") for weight in weights)
    if not legal:
        raise HelixError(
            f"--data-path {' '.join(data_path)} mixes weights and prefixes. Valid: one prefix; several "
            "prefixes; or pairs of a positive weight and a prefix, such as 0.3 first 0.7 second."
        )
    return prefixes, weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_megatron_datasets(
    data_path: Sequence[str],
    tokenizer: Tokenizer,
    sequence_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    *,
    seed: int = 1234,
    split: str = "969,30,1",
    data_cache_path: str | None = None,
    separates: bool = False,
) -> tuple[Any, Any, Any]:
    """Train, valid and test `GPTDataset` (`BlendedDataset` for several prefixes).

    Samples hold `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
    [sequence_length]; no attention mask. Works in one process; with torch.distributed all ranks must
    call it, and rank 0 builds the indices first.

    Args:
        data_path: see `parse_data_path`.
        num_samples: wanted at least from each split; data repeat as often as that needs, but for
            prefixes without weights, of which one epoch is all. None: one epoch. 0: do not build.
        split: Megatron's `--split`; a split of weight 0 is None.
        data_cache_path: directory for the indices; None: `PREFIX/cache` of the first prefix.
        separates: positions begin at 0 behind each end of a document, and the loss of what is predicted from
            that end does not count.

    Raises:
        HelixError: a file or setting that cannot work, before an index is built; or, while building, a
            cache directory that cannot be written.
    """
    check_order(sequence_length, seed)
    prefixes, weights = parse_data_path(data_path)
    summaries, wanted = check_data_path(
        data_path, tokenizer.vocab_size, sequence_length, num_samples, split
    )

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    cache = _cache_directory(data_cache_path or os.path.join(prefixes[0], "cache"), summaries)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=(prefixes, weights),
        split=split,
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=separates,
        reset_attention_mask=False,
        eod_mask_loss=separates,
        create_attention_mask=False,
    )
    # For an empty split or no samples GPTDataset would look for enough epochs of nothing for ever.
    config.split_matrix = [
        bounds if is_wanted else None
        for bounds, is_wanted in zip(config.split_matrix, wanted, strict=True)
    ]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, list(num_samples), lambda: True, config)
    try:
        with _process_group():
            train, valid, test = builder.build()
    except Exception as error:
        # With torch.distributed the builder wraps the OSError in a bare Exception.
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            raise HelixError(
                f"cannot keep the indices of the dataset in {cache}: {error.__cause__ or error}. Name a "
                "directory that you may write to: --data-cache-path DIR."
            ) from error
        raise
    return train, valid, test


def check_data_path(
    data_path: Sequence[str],
    vocab_size: int,
    sequence_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    split: str,
) -> tuple[list[IndexSummary], list[bool]]:
    """Check all that `build_megatron_datasets` will read: a summary per prefix, and which splits are wanted.

    Reads headers and sizes only, so that it can run before any rank starts.
    """
    prefixes, weights = parse_data_path(data_path)
    if weights is not None and None in num_samples:
        raise HelixError("--data-path with weights needs a number of samples for every split.")
    if any(number is not None and number < 0 for number in num_samples):
        raise HelixError(
            f"{listed(num_samples)} samples were asked for. Ask for 0 or more of each."
        )
    summaries = [check_indexed_dataset(prefix, vocab_size) for prefix in prefixes]
    one_epoch = weights is None and len(prefixes) > 1
    wanted = [
        share > 0 and number != 0
        for share, number in zip(parse_split(split), num_samples, strict=True)
    ]
    for summary, part in itertools.product(summaries, range(len(SPLITS))):
        if wanted[part]:
            whole = one_epoch or num_samples[part] is None
            _check_part(summary, part, split, sequence_length + 1 if whole else 1)
    return summaries, wanted


def check_document_ends(data_path: Sequence[str], eod: int) -> None:
    """Check that the first document of every prefix ends with `eod`, by which documents are told apart.

    Raises:
        HelixError: one does not.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for prefix in parse_data_path(data_path)[0]:
        data = IndexedDataset(prefix)
        if data[int(data.document_indices[1]) - 1][-1:].tolist() != [eod]:
            raise HelixError(
                f"the first document of {prefix} does not end with the end-of-document token {eod}, so "
                "--packed-documents cannot tell its documents apart. Make the data with --append-eod, or "
                "leave the flag out."
            )


def _check_part(summary: IndexSummary, part: int, split: str, needed: int) -> None:
    bounds = split_bounds(split, len(summary.lengths))
    part_lengths = summary.lengths[bounds[part] : bounds[part + 1]]
    tokens = int(part_lengths.sum(dtype=np.int64))
    if tokens < needed:
        raise HelixError(
            f"the {SPLITS[part]} part of {summary.prefix} has {len(part_lengths)} of its "
            f"{len(summary.lengths)} documents with {tokens} tokens, but needs at least {needed} "
            f"(--split {split}). Give {SPLITS[part]} a larger weight, or 0 to leave it out, or use more "
            "documents, or a shorter sequence."
        )


def _cache_directory(directory: str, summaries: Sequence[IndexSummary]) -> str:
    """A directory of its own for these lengths.

    megatron-core names cached indices by the dataset's path; after a dataset is made anew at the same
    path it would silently use indices that point elsewhere. Indices depend on nothing but the lengths.
    """
    digests = "".join(summary.digest for summary in summaries)
    return os.path.join(directory, hashlib.blake2b(digests.encode(), digest_size=8).hexdigest())


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """A process group of one, if there is none: `BlendedDataset` asks for its rank whenever it caches."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
