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

from helix_megatron.errors import HelixError

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleDataset(Protocol):
    """A map-style dataset whose samples have `KEYS`, each a tensor [sequence]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def micro_batches(
    dataset: SampleDataset,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    *,
    consumed_samples: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's micro-batches without end, G / (b·D) of them per iteration.

    Yields `KEYS`, each [micro-batch, sequence], with the dtypes of the dataset. `run.config.RunConfig` has
    seen to it that G is a multiple of b·D, so iterations need no loop of their own.

    Args:
        dataset: a `ByteDataset` goes on for ever; others end.
        consumed_samples: samples that all ranks together have trained on before.

    Raises:
        HelixError: the dataset has no more samples.
    """
    first = consumed_samples + data_parallel_rank * micro_batch_size
    while True:
        samples = [_sample(dataset, first + offset) for offset in range(micro_batch_size)]
        yield {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
        first += micro_batch_size * data_parallel_size


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
