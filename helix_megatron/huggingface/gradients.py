"""The norm of a gradient of which every rank holds parts and copies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.core.observe import purpose
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.sharding import sharding_of


@torch.no_grad()
def grad_norm(
    parameters: nn.Module | Iterable[nn.Parameter], tensor_group: ProcessGroup | None = None
) -> Tensor:
    """Euclidean norm of the gradient of the whole model, fp32 [], equal on all ranks of the tensor group.

    Parts (parameters marked `tensor_model_parallel`) are added up over ranks; replicated gradients, which are
    equal on all ranks, count once. Collective over the tensor group.

    Args:
        parameters: a sharded model, or its parameters together with `tensor_group`.
        tensor_group: of the sharding; the model's own when None.
    """
    group = tensor_group or _group_of(parameters)
    grads: dict[bool, list[Tensor]] = {True: [], False: []}
    device = torch.device("cpu")
    for parameter in _listed(parameters):
        device = parameter.device
        if parameter.grad is not None:
            grads[getattr(parameter, "tensor_model_parallel", False)].append(parameter.grad)
    parts, copies = (_squares(grads[cut], device) for cut in (True, False))
    if group is not None and group.size() > 1:
        with purpose("tensor/grad-norm"):
            dist.all_reduce(parts, group=group)
    return (parts + copies).sqrt()


@torch.no_grad()
def clip_grad_norm_(
    parameters: nn.Module | Iterable[nn.Parameter],
    max_norm: float,
    tensor_group: ProcessGroup | None = None,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a sharded model: the norm is the whole model's. Returns it.

    Collective over the tensor group; arguments as in `grad_norm`.
    """
    parameters = _listed(parameters) if tensor_group is not None else parameters
    norm = grad_norm(parameters, tensor_group)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parameter in _listed(parameters):
        if parameter.grad is not None:
            parameter.grad.mul_(scale.to(parameter.grad.dtype))
    return norm


def _listed(parameters: Any) -> list[nn.Parameter]:
    return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)


def _group_of(parameters: Any) -> ProcessGroup | None:
    if not isinstance(parameters, nn.Module):
        raise HelixError(
            "the norm of a list of parameters needs tensor_group. Pass it, or the sharded model."
        )
    sharding = sharding_of(parameters)
    return None if sharding is None else sharding.tensor_group


def _squares(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, in fp32 at least."""
    total = torch.zeros((), device=device)
    for grad in grads:
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = total + torch.linalg.vector_norm(grad, dtype=wide).square()
    return total
