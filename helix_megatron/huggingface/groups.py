"""The process groups that a sharded model needs, as values."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.parallel_state import own_group

TIMEOUT_MINUTES = 30.0
INTRA_HEAD = "INTRA_HEAD_PARALLEL_GROUP"


@dataclass(frozen=True)
class Groups:
    """This rank's groups.

    tensor: the p ranks that hold one model together, in order of i·m + j.
    intra_head: the m neighbours among them that hold the segments of one head group, in order of j.
    data: the ranks that hold the same part of other replicas of the model.
    """

    tensor: ProcessGroup
    intra_head: ProcessGroup
    data: ProcessGroup


def make_groups(
    tensor_parallel_size: int,
    intra_head_parallel_size: int,
    *,
    timeout_minutes: float = TIMEOUT_MINUTES,
) -> Groups:
    """Groups of consecutive ranks. Every rank of the world must call it, with the same arguments.

    Raises:
        HelixError: torch.distributed is not initialised, or the sizes do not divide.
    """
    if not dist.is_initialized():
        raise HelixError(
            "process groups need torch.distributed. Call torch.distributed.init_process_group first, in a "
            "process that torchrun started."
        )
    p, m, world = tensor_parallel_size, intra_head_parallel_size, dist.get_world_size()
    if not isinstance(p, int) or p < 1 or world % p:
        raise HelixError(
            f"tensor parallel size {p!r} does not divide the {world} ranks of the world. "
            f"Valid: {listed(divisors(world))}."
        )
    HelixConfig(m).head_groups(p)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    replicas = [range(start, start + p) for start in range(0, world, p)]
    neighbours = [range(start, start + m) for start in range(0, world, m)]
    return Groups(
        tensor=own_group(replicas, "TENSOR_PARALLEL_GROUP", timeout),
        intra_head=own_group(neighbours, INTRA_HEAD, timeout),
        data=own_group([*zip(*replicas, strict=True)], "DATA_PARALLEL_GROUP", timeout),
    )


def neighbours_of(tensor_group: ProcessGroup, number: int, description: str) -> ProcessGroup:
    """A group of so many neighbours of a tensor group, this rank among them; all of them together are itself.

    Only the ranks of the tensor group call it. `description` is its name in dumps of hangs.
    """
    if number == tensor_group.size():
        return tensor_group
    first = tensor_group.rank() // number * number
    return dist.new_group(
        dist.get_process_group_ranks(tensor_group)[first : first + number],
        timeout=datetime.timedelta(minutes=TIMEOUT_MINUTES),
        group_desc=description,
        use_local_synchronization=True,
    )
