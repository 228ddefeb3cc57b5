"""What operators do with their tensors: which they only take the shape of, FLOPs and bytes by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helix_megatron.graph import attention_kernel, values  # noqa: F401 (the first defines operators)
from helix_megatron.graph.model import BITS, Spec
from helix_megatron.hardware import ATTENTION_BACKWARD_FLOPS

_aten = torch.ops.aten
ATTENTION = torch.ops.helix.attention.default
ATTENTION_BACKWARD = torch.ops.helix.attention_backward.default
# Products, whose matrices are the last two of their tensors; torch 2.6 has no `mm.dtype`.
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}
PRODUCTS |= {getattr(_aten.mm, "dtype", _aten.mm.default)}

KINDS = {"bfloat": "bf", "float": "f", "int": "i", "uint": "u"}
DTYPES = {torch.bool: "bool"}
DTYPES |= {getattr(torch, f"{k}{n}"): f"{kind}{n}" for k, kind in KINDS.items() for n in BITS[kind]}

# The same tensor under another name: no operator of their own.
TRANSPARENT = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
# What they write does not depend on what was there.
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_"}
EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# Of their inputs they take the shape only.
SHAPED = EMPTY | {f"{name}_like" for name in ("zeros", "ones", "full", "rand", "randn")}
SHAPED |= {f"new_{name}" for name in ("zeros", "ones", "full")}
NAMES = {
    ATTENTION: "aten.scaled_dot_product_attention",
    ATTENTION_BACKWARD: "aten.scaled_dot_product_attention_backward",
}


def spec_of(tensor: Tensor) -> Spec:
    """Shape and dtype of a tensor."""
    return Spec(tuple(tensor.shape), DTYPES[tensor.dtype])


def flops_of(func: Any, args: Sequence[Any], inputs: Sequence[Spec]) -> int:
    """FLOPs of a matrix product (2·m·k·n) or of attention; 0 for any other operator."""
    if func in PRODUCTS:
        left, right = inputs[-2:]
        return 2 * left.numel * right.shape[-1]
    if func is ATTENTION:
        return attention_flops(inputs[0], inputs[2], args[4])
    if func is ATTENTION_BACKWARD:
        return round(ATTENTION_BACKWARD_FLOPS * attention_flops(inputs[1], inputs[3], args[6]))
    return 0


def attention_flops(query: Spec, value: Spec, pairs: int) -> int:
    """FLOPs of attention over `pairs` (query, key) pairs of a head; query [B, H, L, D], value [B, G, S, E]."""
    batch, heads, _, dim = query.shape
    return 2 * batch * heads * pairs * (dim + value.shape[-1])


def bytes_moved(inputs: Sequence[Spec], outputs: Sequence[Spec], view: bool) -> int:
    """Bytes read and written by an operator that runs by itself; none for a view."""
    return 0 if view else sum(spec.nbytes for spec in (*inputs, *outputs))


def tensors_of_collective(name: str, args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, inputs) of a c10d operator."""
    first = list(values.tensors_of(args[0])) if args else []
    in_place = name.startswith(("allreduce", "broadcast", "reduce"))
    if in_place and not name.startswith("reduce_scatter"):
        return first, first
    if name == "send":
        return [], first
    if name.startswith("recv"):
        return first, []
    if name.startswith("barrier"):
        return [], []
    return first, list(values.tensors_of(args[1]))
