"""What a sharded model knows of how it is sharded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.huggingface.groups import neighbours_of
from helix_megatron.huggingface.plan import Plan


@dataclass(frozen=True)
class Sharding:
    """How a model is sharded, and this rank's place in it.

    plan: what is cut; tensor_group: the p ranks in order of i·m + j; intra_head_group: the m of its head
        group; kernel: local attention; attention_before: the implementation that the model had.
    """

    plan: Plan
    tensor_group: ProcessGroup
    intra_head_group: ProcessGroup
    kernel: AttentionKernel = sdpa
    attention_before: str = "sdpa"
    _indices: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _neighbours: dict[int, ProcessGroup] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """This rank's place i·m + j in the tensor group."""
        return self.tensor_group.rank()

    def segment_index(self, device: torch.device) -> Tensor:
        """Dimensions of a head that this rank's segments hold, int64 [d/m] on `device`."""
        if device not in self._indices:
            segment = self.plan.layout.partition(self.rank)[1]
            dims = torch.as_tensor(self.plan.layout.segment_dims(segment))
            self._indices[device] = dims.to(device)
        return self._indices[device]

    def neighbours(self, ranks: int) -> ProcessGroup:
        """So many neighbours of the tensor group, this rank among them. Collective when first asked for."""
        if ranks == self.intra_head_group.size():
            return self.intra_head_group
        if ranks not in self._neighbours:
            made = neighbours_of(self.tensor_group, ranks, "MAMBA_PARALLEL_GROUP")
            self._neighbours[ranks] = made
        return self._neighbours[ranks]

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        """A copied model is sharded in the same way, over the same groups."""
        return self


def sharding_of(model: Any) -> Sharding | None:
    """How a model is sharded; None if it is not. Sees through wrappers that keep the model as `module`."""
    while not hasattr(model, "sharding") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return getattr(model, "sharding", None)
