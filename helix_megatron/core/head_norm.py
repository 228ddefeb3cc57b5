"""The mean over a whole head, taken on ranks that hold segments of it."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.collectives import all_reduce

PURPOSE = "exchange/qk-norm"


def head_mean(
    x: Tensor, head_dim: int, group: ProcessGroup | None, *, purpose: str = PURPOSE
) -> Tensor:
    """Mean over the dimensions of a head: [.., d/m] → [.., 1] in a group whose ranks hold its segments.

    Args:
        x: this rank's segment, or whole heads [.., d] where `group` is None.
        head_dim: d.
        group: the m ranks of the head group.
        purpose: under which the meter counts the sum.
    """
    total = x.sum(-1, keepdim=True)
    if group is not None:
        total = all_reduce(total, group, purpose=purpose)
    return total / head_dim
