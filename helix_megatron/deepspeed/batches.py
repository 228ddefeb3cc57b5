"""The ranks that share a model must be given the same batch: say so at once instead of training on nonsense."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.errors import HelixError


def check_first_batch(model: nn.Module, group: ProcessGroup) -> None:
    """Compare the inputs of the model's first forward pass on the ranks of a group, once.

    The forward pass then raises `HelixError` on all ranks if some were given another batch, as a sampler over
    the whole world does.
    """

    def compare(module: nn.Module, args: Any, kwargs: Any) -> None:
        handle.remove()
        digest = _digest((args, kwargs))
        everyone: list[Any] = [None] * group.size()
        dist.all_gather_object(everyone, digest, group=group)
        others = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
        if others:
            raise HelixError(
                f"tensor parallel rank {others[0]} was given another batch than rank 0, though they hold one "
                "model together. Give every rank of a replica the same batch: sample by "
                "engine.mpu.get_data_parallel_rank() of engine.mpu.get_data_parallel_world_size()."
            )

    handle = model.register_forward_pre_hook(compare, with_kwargs=True)


def _digest(inputs: Any) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in _tensors(inputs):
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        value = tensor.detach().to("cpu")
        # numpy knows no bfloat16
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.numel():
            yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
