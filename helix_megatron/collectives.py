"""Differentiable collectives over a given process group.

Four primitives work on a leading axis of k entries, one for each of the k ranks:

    gather        x [...]    -> y [k, ...]   y[t] = x of rank t
    scatter_sum   x [k, ...] -> y [...]      y = sum over ranks s of their x[this rank]
    swap          x [k, ...] -> y [k, ...]   y[t] = rank t's x[this rank]
    all_reduce    x [...]    -> y [...]      y = sum over ranks of x

Each is linear, and the backward of each is the `.apply` of its adjoint (gather ↔ scatter_sum, swap ↔ swap,
all_reduce ↔ all_reduce), so gradients compose and can be differentiated again. A result counts as this rank's
own variable: what every rank does with its copy adds up in the gradient.

`all_gather`, `reduce_scatter` and `all_to_all` put a tensor dimension `dim` in place of the leading axis. A
group of one rank is the identity and runs nothing. Each takes the `purpose` under which the meter counts it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.errors import HelixError
from helix_megatron.observe import purpose as purpose_of

# torch 2.13 renamed these two and warns about the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# gloo's all-gather goes round a ring in k−1 steps that wait for each other. Up to about this size per rank an
# all-to-all of k copies is faster: 12 instead of 20 ms for 8 ranks on 2 cores, and as fast for 2 ranks.
_GLOO_DIRECT_BYTES = 256 << 10


@dataclass
class _Handle:
    """Where an asynchronous primitive leaves its `Work`."""

    work: Any = None


# ------------------------------------------------------------------------- primitives


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str, handle: _Handle | None):
        ctx.group, ctx.purpose = group, purpose
        y = x.new_empty((group.size(), *x.shape))
        collective, sent = _all_gather_single, x.contiguous()
        if dist.get_backend(group) == "gloo" and x.nbytes <= _GLOO_DIRECT_BYTES:
            collective, sent = dist.all_to_all_single, x.expand_as(y).contiguous()
        with purpose_of(purpose):
            work = collective(y.view(-1), sent.view(-1), group=group, async_op=handle is not None)
        if handle is not None:
            handle.work = work
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
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str, handle: _Handle | None):
        ctx.group, ctx.purpose = group, purpose
        x = x.contiguous()
        y = torch.empty_like(x)
        with purpose_of(purpose):
            work = dist.all_to_all_single(
                y.view(-1), x.view(-1), group=group, async_op=handle is not None
            )
        if handle is not None:
            handle.work = work
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Swap.apply(grad, ctx.group, ctx.purpose, None), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str, handle: _Handle | None):
        ctx.group, ctx.purpose = group, purpose
        y = x.clone(memory_format=torch.contiguous_format)
        with purpose_of(purpose):
            work = dist.all_reduce(y, group=group, async_op=handle is not None)
        if handle is not None:
            handle.work = work
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _AllReduce.apply(grad, ctx.group, ctx.purpose, None), None, None, None


# ----------------------------------------------------------------- on a leading axis


@dataclass
class Pending:
    """An asynchronous collective under way. `wait` returns its result, for use in autograd as usual.

    Only the forward pass is asynchronous: backward runs the adjoint where autograd reaches it.
    """

    _buffer: Tensor
    _handle: _Handle
    _finish: Callable[[Tensor], Tensor] = lambda buffer: buffer

    def wait(self) -> Tensor:
        if self._handle.work is not None:
            self._handle.work.wait()
            self._handle.work = None
        return self._finish(self._buffer)

    def then(self, finish: Callable[[Tensor], Tensor]) -> Pending:
        """The same collective, its result reshaped when it is there."""
        return Pending(self._buffer, self._handle, lambda buffer: finish(self._finish(buffer)))


def gather(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[...] → [k, ...]: every rank's tensor, of equal shapes."""
    if group.size() == 1:
        return x.unsqueeze(0)
    return _Gather.apply(x, group, purpose, None)


def gather_async(x: Tensor, group: ProcessGroup, *, purpose: str) -> Pending:
    """`gather` that returns at once."""
    if group.size() == 1:
        return Pending(x.unsqueeze(0), _Handle())
    handle = _Handle()
    return Pending(_Gather.apply(x, group, purpose, handle), handle)


def scatter_sum(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[k, ...] → [...]: the sum over ranks of the entry that each holds for this rank."""
    _check_leading(x, group, "scatter_sum")
    if group.size() == 1:
        return x.squeeze(0)
    return _ScatterSum.apply(x, group, purpose)


def scatter_sum_async(x: Tensor, group: ProcessGroup, *, purpose: str) -> Pending:
    """`scatter_sum` that returns at once: an all-to-all under way, summed here when it is waited for."""
    wide = torch.promote_types(x.dtype, torch.float32)
    swapped = swap_async(x, group, purpose=purpose)
    return swapped.then(lambda parts: parts.sum(0, dtype=wide).to(x.dtype))


def swap(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[k, ...] → [k, ...]: entry t goes to rank t, and rank t's entry for this rank comes in its place."""
    _check_leading(x, group, "swap")
    if group.size() == 1:
        return x
    return _Swap.apply(x, group, purpose, None)


def swap_async(x: Tensor, group: ProcessGroup, *, purpose: str) -> Pending:
    """`swap` that returns at once."""
    _check_leading(x, group, "swap")
    if group.size() == 1:
        return Pending(x, _Handle())
    handle = _Handle()
    return Pending(_Swap.apply(x, group, purpose, handle), handle)


def all_reduce(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """[...] → [...]: the sum over ranks. The input is left as it is."""
    if group.size() == 1:
        return x
    return _AllReduce.apply(x, group, purpose, None)


def all_reduce_async(x: Tensor, group: ProcessGroup, *, purpose: str) -> Pending:
    """`all_reduce` that returns at once."""
    if group.size() == 1:
        return Pending(x, _Handle())
    handle = _Handle()
    return Pending(_AllReduce.apply(x, group, purpose, handle), handle)


# ------------------------------------------------------------------------ on a dimension


def all_gather(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Tensor:
    """Concatenate every rank's tensor along `dim`: [.., a, ..] → [.., k·a, ..]."""
    return _joined(gather(x, group, purpose=purpose), dim % x.dim())


def all_gather_async(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Pending:
    """`all_gather` that returns at once."""
    dim %= x.dim()
    return gather_async(x, group, purpose=purpose).then(lambda stacked: _joined(stacked, dim))


def reduce_scatter(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Tensor:
    """Sum over ranks and keep this rank's part of `dim`: [.., k·a, ..] → [.., a, ..].

    Raises:
        HelixError: `dim` does not divide by the number of ranks.
    """
    return scatter_sum(_leading(x, group, dim), group, purpose=purpose)


def reduce_scatter_async(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Pending:
    """`reduce_scatter` that returns at once."""
    return scatter_sum_async(_leading(x, group, dim), group, purpose=purpose)


def all_to_all(
    x: Tensor, group: ProcessGroup, *, split_dim: int, concat_dim: int, purpose: str
) -> Tensor:
    """Cut `split_dim` into one part per rank, send them, and join what arrives along `concat_dim`.

    Raises:
        HelixError: `split_dim` does not divide by the number of ranks.
    """
    swapped = swap(_leading(x, group, split_dim), group, purpose=purpose)
    return _joined(swapped, concat_dim % x.dim())


def all_to_all_async(
    x: Tensor, group: ProcessGroup, *, split_dim: int, concat_dim: int, purpose: str
) -> Pending:
    """`all_to_all` that returns at once."""
    concat_dim %= x.dim()
    swapped = swap_async(_leading(x, group, split_dim), group, purpose=purpose)
    return swapped.then(lambda stacked: _joined(stacked, concat_dim))


def _joined(stacked: Tensor, dim: int) -> Tensor:
    """[k, .., a, ..] → [.., k·a, ..]"""
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _leading(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """[.., k·a, ..] → [k, .., a, ..]"""
    dim %= x.dim()
    ranks = group.size()
    if x.size(dim) % ranks:
        raise HelixError(
            f"dimension {dim} of a tensor of shape {tuple(x.shape)} cannot be cut into {ranks} equal "
            f"parts. It must be a multiple of the {ranks} ranks of the group."
        )
    return x.unflatten(dim, (ranks, -1)).movedim(dim, 0)


def _check_leading(x: Tensor, group: ProcessGroup, name: str) -> None:
    if x.dim() == 0 or x.size(0) != group.size():
        raise HelixError(
            f"{name} needs a leading axis of {group.size()}, one entry for each rank of the group, and "
            f"got a tensor of shape {tuple(x.shape)}."
        )
