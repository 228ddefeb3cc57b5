"""Differentiable collectives over a given process group.

Four primitives work on a leading axis of k entries, one for each of the k ranks:

    gather        x [...]    -> y [k, ...]   y[t] = x of rank t
    scatter_sum   x [k, ...] -> y [...]      y = sum over ranks s of their x[this rank]
    swap          x [k, ...] -> y [k, ...]   y[t] = rank t's x[this rank]
    all_reduce    x [...]    -> y [...]      y = sum over ranks of x

Each is linear, and the backward of each is the `.apply` of its adjoint (gather ↔ scatter_sum, swap ↔ swap,
all_reduce ↔ all_reduce), so gradients compose and can be differentiated again. A result counts as this rank's
own variable: what every rank does with its copy adds up in the gradient.

`all_gather` puts a tensor dimension in place of the leading axis. A group of one rank is the identity and runs
nothing. Each takes the `purpose` under which the meter counts it.

Half-precision parts are summed in fp32 and rounded once, on every back end: a sum is a swap and a local sum,
which sends as much as a reduce-scatter, and an all-reduce of half precision is that and a gather.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.observe import purpose as purpose_of
from helix_megatron.errors import HelixError

# torch 2.13 renamed it and warns about the old name.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# gloo's all-gather goes round a ring in k−1 steps that wait for each other. Up to about this size per rank an
# all-to-all of k copies is faster: 12 instead of 20 ms for 8 ranks on 2 cores, and as fast for 2 ranks.
_GLOO_DIRECT_BYTES = 256 << 10


def backend_of(group: ProcessGroup, device: torch.device) -> str:
    """The back end that moves a device's tensors: a mixed group has several, and a name of its own."""
    return group._get_backend(device).name()


# ------------------------------------------------------------------------- primitives


def _gathered(
    x: Tensor, group: ProcessGroup, purpose: str, works: list[Any] | None = None
) -> Tensor:
    y = x.new_empty((group.size(), *x.shape))
    collective, sent = _all_gather_single, x.contiguous()
    if x.nbytes <= _GLOO_DIRECT_BYTES and backend_of(group, x.device) == "gloo":
        collective, sent = dist.all_to_all_single, x.expand_as(y).contiguous()
    with purpose_of(purpose):
        work = collective(y.view(-1), sent.view(-1), group=group, async_op=works is not None)
    if works is not None:
        works.append(work)
    return y


def _swapped(x: Tensor, group: ProcessGroup, purpose: str) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    with purpose_of(purpose):
        dist.all_to_all_single(y.view(-1), x.view(-1), group=group)
    return y


def _summed(x: Tensor, group: ProcessGroup, purpose: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return _swapped(x, group, purpose).sum(0, dtype=wide).to(x.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str, works: list[Any] | None):
        ctx.group, ctx.purpose = group, purpose
        return _gathered(x, group, purpose, works)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _ScatterSum.apply(grad, ctx.group, ctx.purpose), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        return _summed(x, group, purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Gather.apply(grad, ctx.group, ctx.purpose, None), None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        return _swapped(x, group, purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Swap.apply(grad, ctx.group, ctx.purpose), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        if x.element_size() < 4:
            ranks = group.size()
            flat = F.pad(x.reshape(-1), (0, -x.numel() % ranks)).unflatten(0, (ranks, -1))
            y = _gathered(_summed(flat, group, purpose), group, purpose)
            return y.view(-1)[: x.numel()].view(x.shape)
        y = x.clone(memory_format=torch.contiguous_format)
        with purpose_of(purpose):
            dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _AllReduce.apply(grad, ctx.group, ctx.purpose), None, None


# ------------------------------------------------------------------------ public forms


def gather(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[...] → [k, ...]: every rank's tensor, of equal shapes."""
    if group.size() == 1:
        return x.unsqueeze(0)
    return _Gather.apply(x, group, purpose, None)


def gather_async(x: Tensor, group: ProcessGroup, *, purpose: str) -> Callable[[], Tensor]:
    """`gather` that returns at once: a function that waits for the result and returns it.

    Only the forward pass is asynchronous: backward runs the adjoint where autograd reaches it.
    """
    works: list[Any] = []
    y = x.unsqueeze(0) if group.size() == 1 else _Gather.apply(x, group, purpose, works)

    def result() -> Tensor:
        while works:
            works.pop().wait()
        return y

    return result


def scatter_sum(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[k, ...] → [...]: the sum over ranks of the entry that each holds for this rank."""
    _check_leading(x, group, "scatter_sum")
    if group.size() == 1:
        return x.squeeze(0)
    return _ScatterSum.apply(x, group, purpose)


def swap(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[k, ...] → [k, ...]: entry t goes to rank t, and rank t's entry for this rank comes in its place."""
    _check_leading(x, group, "swap")
    if group.size() == 1:
        return x
    return _Swap.apply(x, group, purpose)


def all_reduce(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[...] → [...]: the sum over ranks. The input is left as it is."""
    if group.size() == 1:
        return x
    return _AllReduce.apply(x, group, purpose)


def all_gather(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Tensor:
    """Concatenate every rank's tensor along `dim`: [.., a, ..] → [.., k·a, ..]."""
    dim %= x.dim()
    return gather(x, group, purpose=purpose).movedim(0, dim).flatten(dim, dim + 1)


def _check_leading(x: Tensor, group: ProcessGroup, name: str) -> None:
    if x.dim() == 0 or x.size(0) != group.size():
        raise HelixError(
            f"{name} needs a leading axis of {group.size()}, one entry for each rank of the group, and "
            f"got a tensor of shape {tuple(x.shape)}."
        )
