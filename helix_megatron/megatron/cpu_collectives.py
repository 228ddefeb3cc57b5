"""Gathers and reduce-scatters of unequal parts, which gloo does not offer.

Experts that are cut by tensor parallelism exchange as many tokens as the router sent to each rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_parts(
    part: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]
) -> torch.Tensor:
    """All ranks' parts, one after the other: `[sizes[rank], ...] -> [sum(sizes), ...]`.

    The parts travel padded to the largest.
    """
    padded = part.new_zeros(max(sizes), *part.shape[1:])
    padded[: part.shape[0]] = part
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([whole[:size] for whole, size in zip(gathered, sizes, strict=True)])


def reduce_scatter_parts(
    whole: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]
) -> torch.Tensor:
    """This rank's part of the sum over ranks: `[sum(sizes), ...] -> [sizes[rank], ...]`.

    Every rank gets its part from all others and adds them up.
    """
    size = sizes[group.rank()]
    parts = whole.new_empty(len(sizes) * size, *whole.shape[1:])
    dist.all_to_all_single(parts, whole.contiguous(), [size] * len(sizes), list(sizes), group=group)
    return parts.view(len(sizes), size, *whole.shape[1:]).sum(dim=0)
