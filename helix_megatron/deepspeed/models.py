"""What is known of a model whose ranks hold parts, and the groups of those ranks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.core.layout import HeadLayout
from helix_megatron.deepspeed.config import KEY, HelixBlock, check_divides
from helix_megatron.errors import HelixError
from helix_megatron.parallel_state import all_ranks_of, own_group


@dataclass
class CutModel:
    """A model whose ranks hold parts.

    layout: of its attention layers.
    parameters: of each cut parameter, by its name in the state dictionary, the dimension and the index of it
        that each rank holds (`huggingface.Cut`); empty where the host's own checkpoints know.
    attached: what remains to be done when the engine is there.
    """

    block: HelixBlock
    host: str
    layout: HeadLayout
    parameters: dict[str, Any] = field(default_factory=dict)
    attached: list[Callable[[Any], None]] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """One sentence for the log: the host, the ranks and how their heads are cut."""
        layout = self.layout
        return (
            f"{self.host} model on {layout.num_ranks} tensor parallel ranks, {layout.head_groups} head groups "
            f"of {layout.segments} segments, query layout {layout.query_layout}, attention "
            f"{self.block.helix.attention}."
        )

    @property
    def description(self) -> dict[str, Any]:
        """What must be known to read a checkpoint of it: plain, for JSON."""
        return {
            "host": self.host,
            "block": self.block.to_dict(),
            "layout": dataclasses.asdict(self.layout),
        }


def megatron_config(model: nn.Module) -> Any:
    """The configuration of a megatron-core model; None of others."""
    module = sys.modules.get("megatron.core.transformer.transformer_config")
    if module is None:
        return None
    configs = (getattr(part, "config", None) for part in model.modules())
    return next((c for c in configs if isinstance(c, module.TransformerConfig)), None)


# ----------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class ModelParallelUnit:
    """DeepSpeed's `mpu`: who shares one model (tensor), and who holds the same part of others (data).

    It has the methods that DeepSpeed 0.19 calls and no others. Above all not `initialize_sequence_parallel`:
    an `mpu` with that name is taken for one of sequence parallelism, and ZeRO then forgets the tensor
    parallel group when it sums gradient norms (utils/groups.py:774, :854).
    """

    tensor_group: ProcessGroup
    data_group: ProcessGroup

    # Whatever holds one model: DeepSpeed sums norms and looks for overflow over it.

    def get_model_parallel_rank(self) -> int:
        return self.tensor_group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_group.size()

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.tensor_group

    # The same by Megatron's newer names: the MoE layer and checkpoints ask by these.

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.tensor_group)[0]

    # Replicas: gradients are averaged and ZeRO's states are dealt among them.

    def get_data_parallel_rank(self) -> int:
        return self.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.data_group.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.data_group)


def tensor_group_of(mpu: Any) -> ProcessGroup:
    """The tensor parallel group of a caller's `mpu`."""
    for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
        if hasattr(mpu, name):
            return getattr(mpu, name)()
    raise HelixError(
        f"the mpu that was passed, of type {type(mpu).__name__}, has no get_tensor_model_parallel_group and no "
        f'get_model_parallel_group. Leave mpu out: the block "{KEY}" makes the groups.'
    )


def unit_of(mpu: Any) -> ModelParallelUnit:
    """The groups of a caller's `mpu` in the shape that DeepSpeed takes."""
    if isinstance(mpu, ModelParallelUnit):
        return mpu
    tensor = tensor_group_of(mpu)
    if not hasattr(mpu, "get_data_parallel_group"):
        raise HelixError(
            f"the mpu that was passed, of type {type(mpu).__name__}, has no get_data_parallel_group. "
            f'Leave mpu out: the block "{KEY}" makes the groups.'
        )
    return ModelParallelUnit(tensor, mpu.get_data_parallel_group())


def unit_beside(tensor_group: ProcessGroup) -> ModelParallelUnit:
    """The unit of a tensor parallel group, with new data parallel groups. Every rank of the world calls it."""
    replicas = [*zip(*all_ranks_of(tensor_group), strict=True)]
    return ModelParallelUnit(tensor_group, own_group(replicas, "DATA_PARALLEL_GROUP"))


def with_size(block: HelixBlock, size: int, whose: str) -> HelixBlock:
    """The block with the tensor parallel size that `whose` groups have."""
    if block.tensor_parallel_size not in (None, size):
        raise HelixError(
            f'"tensor_parallel_size" {block.tensor_parallel_size} in the block "{KEY}" is not that of '
            f"{whose}, {size}. Leave it out, or make them equal."
        )
    check_divides(
        block.helix.intra_head_parallel_size, size, f"the tensor parallel size {size} of {whose}"
    )
    return dataclasses.replace(block, tensor_parallel_size=size)
