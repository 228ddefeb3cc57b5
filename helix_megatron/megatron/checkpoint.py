"""Sharded tensors whose rows or columns are a permutation of the global ones.

megatron-core describes a rank's part of a global tensor as boxes. The part of rank (i, j) is several: one per
contiguous run of its index. A `ShardedTensorFactory` says so, for weights and, since the optimizer applies it
to its own tensors, for optimizer state.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from helix_megatron.core.layout import contiguous_runs


@dataclasses.dataclass
class PermutedFactory(ShardedTensorFactory):
    """A factory that also tells the global tensor and the index it stands for.

    The data are `index` along `axis` of the global tensor `global_shape`, below the leading (layer) axes
    at `leading_offset`.
    """

    axis: int = 0
    index: np.ndarray | None = None
    global_shape: tuple[int, ...] = ()
    leading_offset: tuple[int, ...] = ()


def permuted(
    sharded: ShardedTensor, axis: int, index: np.ndarray, leading_axes: int
) -> PermutedFactory:
    """What `sharded` describes, except that its data are `index` along `axis` of the global tensor.

    Args:
        sharded: stock's description of a tensor parallel part: key, global shape, replica.
        axis: of the data, the one that is permuted.
        index: int64, the global position of each local one.
        leading_axes: how many axes (layers) the global tensor has before those of the data.
    """
    runs = contiguous_runs(index)
    leading_offset = tuple(sharded.global_offset[:leading_axes])
    global_shape = tuple(sharded.global_shape)

    @torch.no_grad()
    def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
        parts = []
        for part, (start, _) in zip(
            data.split([length for _, length in runs], axis), runs, strict=True
        ):
            offset = [0] * data.dim()
            offset[axis] = start
            # Runs differ in length, so the boxes are no regular grid: the leading axes go into the data.
            boxed = part.contiguous()[(None,) * leading_axes]
            parts.append(
                ShardedTensor(
                    key,
                    boxed,
                    boxed.dtype,
                    tuple(boxed.shape),
                    global_shape,
                    (*leading_offset, *offset),
                    None,
                    replica_id,
                )
            )
        return parts

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat([part[(0,) * leading_axes] for part in parts], axis)

    return PermutedFactory(
        sharded.key,
        sharded.data,
        build,
        merge,
        sharded.replica_id,
        axis=axis,
        index=index,
        global_shape=global_shape[leading_axes:],
        leading_offset=leading_offset,
    )
