"""Collectives at the border between replicated values and values that each rank has its own of.

In `collectives` a result counts as each rank's own variable. A model whose ranks all compute the same loss from
the same hidden states is another matter: what is replicated is *one* variable of which every rank holds a copy,
and its gradient is replicated as well. These three keep that true (Megatron-LM, arXiv 1909.08053, section 3,
calls the first two f and g):

    to_ranks     one variable → a use on every rank       forward identity     backward sum over ranks
    sum_of       a part on every rank → their sum         forward all-reduce   backward identity
    joined       a part on every rank → all parts, joined forward all-gather   backward this rank's part

A group of one rank runs nothing. Each takes the `purpose` under which the meter counts it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core import collectives


class _ToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _SumOf.apply(grad, ctx.group, ctx.purpose), None, None


class _SumOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, purpose: str):
        ctx.group, ctx.purpose = group, purpose
        return collectives.all_reduce(x, group=group, purpose=purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _ToRanks.apply(grad, ctx.group, ctx.purpose), None, None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, purpose: str):
        ctx.group, ctx.dim, ctx.purpose = group, dim, purpose
        return collectives.all_gather(x, group=group, dim=dim, purpose=purpose)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Own.apply(grad, ctx.group, ctx.dim, ctx.purpose), None, None, None


class _Own(torch.autograd.Function):
    """This rank's part of a replicated value, the adjoint of `_Joined`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, dim: int, purpose: str):
        ctx.group, ctx.dim, ctx.purpose = group, dim, purpose
        return x.chunk(group.size(), dim)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return _Joined.apply(grad, ctx.group, ctx.dim, ctx.purpose), None, None, None


def to_ranks(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """A replicated value, about to be used differently on every rank: the same, any shape."""
    return x if group.size() == 1 else _ToRanks.apply(x, group, purpose)


def sum_of(x: Tensor, group: ProcessGroup, *, purpose: str) -> Tensor:
    """The sum of every rank's part, replicated: the same shape. The input is left as it is."""
    return x if group.size() == 1 else _SumOf.apply(x, group, purpose)


def joined(x: Tensor, group: ProcessGroup, *, dim: int, purpose: str) -> Tensor:
    """Every rank's part, of equal shapes, along `dim`, replicated: [.., a, ..] → [.., k·a, ..]."""
    return x if group.size() == 1 else _Joined.apply(x, group, dim, purpose)
