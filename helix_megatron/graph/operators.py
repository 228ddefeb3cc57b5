"""What the dispatcher's operators do to their arguments: which they write, view, or only take the shape of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_megatron.graph import costs, values

_aten = torch.ops.aten
# The same tensor under another name: no operator of their own.
TRANSPARENT = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default}
# What they write does not depend on what was there.
OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_"}
EMPTY = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
# Of their inputs they take the shape only.
SHAPED = EMPTY | {f"{name}_like" for name in ("zeros", "ones", "full", "rand", "randn")}
SHAPED |= {f"new_{name}" for name in ("zeros", "ones", "full")}
NAMES = {
    costs.ATTENTION: "aten.scaled_dot_product_attention",
    costs.ATTENTION_BACKWARD: "aten.scaled_dot_product_attention_backward",
}


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
