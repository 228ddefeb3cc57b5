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
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.observe import purpose as purpose_of
from helix_megatron.errors import HelixError

# torch 2.13 renamed these two and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# gloo's all-gather goes round a ring in k−1 steps that wait for each other. Up to about this size per rank an
# all-to-all of k copies is faster: 12 instead of 20 ms for 8 ranks on 2 cores, and as fast for 2 ranks.
_GLOO_DIRECT_BYTES = 256 << 10


# ------------------------------------------------------------------------- primitives


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str, works: list[Any] | None):
        ctx.group, ctx.purpose = group, purpose
        y = x.new_empty((group.size(), *x.shape))
        collective, sent = _all_gather_single, x.contiguous()
        if dist.get_backend(group) == "gloo" and x.nbytes <= _GLOO_DIRECT_BYTES:
            collective, sent = dist.all_to_all_single, x.expand_as(y).contiguous()
        with purpose_of(purpose):
            work = collective(y.view(-1), sent.view(-1), group=group, async_op=works is not None)
        if works is not None:
            works.append(work)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _ScatterSum.apply(grad, ctx.group, ctx.purpose), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        x = x.contiguous()
        with purpose_of(purpose):
            if dist.get_backend(group) != "gloo":
                y = x.new_empty(x.shape[1:])
                _reduce_scatter_single(y.view(-1), x.view(-1), group=group)
                return y
            # gloo's reduce-scatter is several times slower than an all-to-all and a local sum, and the sum
            # of half-precision parts is better taken in fp32.
            parts = torch.empty_like(x)
            dist.all_to_all_single(parts.view(-1), x.view(-1), group=group)
        wide = torch.promote_types(x.dtype, torch.float32)
        return parts.sum(0, dtype=wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Gather.apply(grad, ctx.group, ctx.purpose, None), None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        x = x.contiguous()
        y = torch.empty_like(x)
        with purpose_of(purpose):
            dist.all_to_all_single(y.view(-1), x.view(-1), group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Swap.apply(grad, ctx.group, ctx.purpose), None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
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
