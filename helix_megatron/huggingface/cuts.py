"""How one parameter is dealt to the ranks: which of its rows or columns each holds, in which order.

A cut is a value: it needs no process group and no tensor. `take` cuts a whole tensor, `join` is its inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from helix_megatron.core.layout import HeadLayout, contiguous_runs
from helix_megatron.errors import HelixError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """Dimension `dim` is dealt to ranks: rank r holds `indices[r]` of it, int64, in that order.

    Together the indices are every position once. `even` says that all ranks hold equally many.
    """

    dim: int
    indices: tuple[np.ndarray, ...]

    @property
    def size(self) -> int:
        return sum(index.size for index in self.indices)

    @property
    def even(self) -> bool:
        return len({index.size for index in self.indices}) == 1

    def whole_shape(self, local_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the whole parameter from that of any rank's part."""
        shape = list(local_shape)
        shape[self.dim] = self.size
        return tuple(shape)

    def local_shape(self, whole_shape: Sequence[int], rank: int) -> tuple[int, ...]:
        shape = list(whole_shape)
        shape[self.dim] = self.indices[rank].size
        return tuple(shape)

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's part, a new contiguous tensor: [.., size, ..] → [.., len(indices[rank]), ..]."""
        import torch

        runs = contiguous_runs(self.indices[rank])
        parts = [whole.narrow(self.dim, start, length) for start, length in runs]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].clone()

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all ranks, in order of rank."""
        if len(parts) != len(self.indices):
            raise HelixError(
                f"{len(parts)} parts were given of a parameter that {len(self.indices)} ranks hold. Give "
                "one of each rank, in order of rank."
            )
        whole = parts[0].new_empty(self.whole_shape(parts[0].shape))
        for rank, part in enumerate(parts):
            self.put(whole, part, rank)
        return whole

    def put(self, whole: Tensor, part: Tensor, rank: int) -> None:
        """Write a rank's part to its place in a whole tensor."""
        wanted = self.local_shape(whole.shape, rank)
        if tuple(part.shape) != wanted:
            raise HelixError(
                f"rank {rank} of {len(self.indices)} holds {wanted} of a parameter of shape "
                f"{tuple(whole.shape)}, and its part has shape {tuple(part.shape)}. Give the parts of one "
                "model, cut with the same setting, in order of rank."
            )
        start = 0
        for first, length in contiguous_runs(self.indices[rank]):
            whole.narrow(self.dim, first, length).copy_(part.narrow(self.dim, start, length))
            start += length


@lru_cache(maxsize=256)
def block_cut(dim: int, size: int, ranks: int, blocks: int = 1) -> Cut:
    """Each of `blocks` equal blocks of a dimension dealt in neighbouring parts, as equal as can be.

    With 2 blocks a rank's part of a stacked [gate; up] is its rows of gate, then its rows of up.
    """
    positions = np.arange(size).reshape(blocks, -1)
    parts = np.array_split(positions, ranks, axis=1)
    return Cut(dim, tuple(part.reshape(-1) for part in parts))


def parts_cut(dim: int, sizes: Sequence[int], ranks: int) -> Cut:
    """Each of the neighbouring parts of a dimension, of these sizes, dealt as `block_cut` deals one."""
    starts = np.cumsum([0, *sizes])
    parts = [block_cut(dim, size, ranks).indices for size in sizes]
    dealt = (
        [start + part[r] for start, part in zip(starts, parts, strict=False)] for r in range(ranks)
    )
    return Cut(dim, tuple(map(np.concatenate, dealt)))


@lru_cache(maxsize=256)
def query_cut(dim: int, layout: HeadLayout) -> Cut:
    """Rows of a query projection, or columns of an output projection, [h, d]."""
    return Cut(dim, tuple(layout.query_rows(rank) for rank in range(layout.num_ranks)))


@lru_cache(maxsize=256)
def kv_cut(dim: int, layout: HeadLayout) -> Cut:
    """Rows of a key or value projection, [g, d]."""
    return Cut(dim, tuple(layout.kv_rows(rank) for rank in range(layout.num_ranks)))
