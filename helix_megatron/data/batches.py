"""Which samples each data parallel rank trains on, in Megatron's order.

With global batch size G, micro-batch size b and data parallel size D, iteration k trains on samples
[k·G, (k+1)·G) of the dataset, whatever b and D are; and micro-batch i of rank d is

    k·G + i·b·D + d·b + [0, b)

(`MegatronPretrainingSampler` of Megatron-LM). A run can therefore go on with other ranks where it
stopped: the number of consumed samples says it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from helix_megatron.errors import HelixError, divisors, listed

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleDataset(Protocol):
    """A map-style dataset whose samples have `KEYS`, each a tensor [sequence]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def micro_batches(
    dataset: SampleDataset,
    micro_batch_size: int,
    global_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    consumed_samples: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches without end, G / (b·D) of them per iteration.

    Yields `KEYS`, each [micro-batch, sequence], with the dtypes of the dataset. The arguments are
    checked at the call, not at the first batch.

    Args:
        dataset: `ByteDataset` without `num_samples` goes on for ever; others end.
        consumed_samples: samples that all ranks together have trained on before.

    Raises:
        HelixError: sizes that do not divide, a rank out of range; while iterating, a dataset that has
            no more samples.
    """
    _check_sizes(micro_batch_size, global_batch_size, data_parallel_rank, data_parallel_size)
    if consumed_samples < 0:
        raise HelixError(f"{consumed_samples} consumed samples: give 0 or more.")
    return _micro_batches(
        dataset,
        micro_batch_size,
        first=consumed_samples + data_parallel_rank * micro_batch_size,
        stride=micro_batch_size * data_parallel_size,
    )


def _micro_batches(
    dataset: SampleDataset, micro_batch_size: int, first: int, stride: int
) -> Iterator[dict[str, torch.Tensor]]:
    # G is a multiple of the stride, so iterations need no loop of their own.
    while True:
        samples = [_sample(dataset, first + offset) for offset in range(micro_batch_size)]
        yield {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
        first += stride


def _sample(dataset: SampleDataset, index: int) -> dict[str, Any]:
    try:
        return dataset[index]
    except IndexError as error:
        if index < len(dataset):
            raise
        raise HelixError(
            f"the dataset has {len(dataset)} samples and is exhausted: sample {index} was asked for "
            "(the first is 0). Train for fewer iterations or with a smaller global batch, or build "
            "the dataset with more samples. A blend without weights never repeats its data; with "
            "weights (--data-path 1 PREFIX ...) it does."
        ) from error


def _check_sizes(micro_batch: int, global_batch: int, rank: int, ranks: int) -> None:
    sizes = {
        "micro-batch size": micro_batch,
        "global batch size": global_batch,
        "data-parallel size": ranks,
    }
    for name, size in sizes.items():
        if size < 1:
            raise HelixError(f"{name} {size} is not positive. Give at least 1.")
    if not 0 <= rank < ranks:
        raise HelixError(f"data-parallel rank {rank} is out of range. Valid: 0 to {ranks - 1}.")
    step = micro_batch * ranks
    if global_batch % step == 0:
        return
    lower = global_batch // step * step
    advice = f"Try --global-batch-size {' or '.join(str(s) for s in (lower, lower + step) if s)}"
    if global_batch % ranks == 0:
        valid = divisors(global_batch // ranks)
        advice += f", or keep {global_batch} with micro-batch {listed(valid)}."
    elif global_batch % micro_batch == 0:
        valid = divisors(global_batch // micro_batch)
        advice += f", or keep {global_batch} with data-parallel {listed(valid)}."
    else:
        advice += "."
    raise HelixError(
        f"global_batch_size {global_batch} is not a multiple of micro-batch {micro_batch} × "
        f"data-parallel {ranks} = {step}. {advice}"
    )
