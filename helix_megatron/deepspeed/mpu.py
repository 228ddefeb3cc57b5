"""The groups of one engine, in the shape in which DeepSpeed asks for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


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

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_group.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_group.size()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self.tensor_group

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
