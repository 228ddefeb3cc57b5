"""Whether a state that is about to be saved has only finite numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from helix_megatron.errors import HelixError

SHARDED = (ShardedTensor, ShardedTensorFactory)


def check_finite(state: dict[str, Any]) -> None:
    """Refuse a sharded state dictionary in which this rank has a number that is not finite.

    Raises:
        HelixError: names the tensor.
    """
    for item in nested_values(state):
        data = getattr(item, "data", None) if isinstance(item, SHARDED) else None
        if not isinstance(data, torch.Tensor) or not data.is_floating_point() or not data.numel():
            continue
        # NaN is passed on by both; unlike `isfinite` this takes no memory of the tensor's size.
        if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(data.detach())):
            raise HelixError(f"{item.key} holds numbers that are NaN or infinite.")
