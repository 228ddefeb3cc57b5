"""What Megatron and torch look up outside of the operators that they run, where tensors have no data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from helix_megatron.core.kernels import sdpa
from helix_megatron.graph import values
from helix_megatron.graph.attention_kernel import scaled_dot_product_attention


@contextlib.contextmanager
def new_process() -> Iterator[None]:
    """What a new process would have: no router losses of earlier steps, and biases that are shapes only."""
    with _fresh_router_losses(), _biases_of_shapes():
        yield


def _router_losses() -> dict[str, Any]:
    """Where Megatron keeps them: from 0.18 on in a tracker, of which the older function gives a copy."""
    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return moe_utils.get_moe_metrics_tracker().metrics
    return moe_utils.get_moe_layer_wise_logging_tracker()


@contextlib.contextmanager
def _fresh_router_losses() -> Iterator[None]:
    """What Megatron keeps of router losses from step to step, as a new process has it: nothing."""
    losses, scale = _router_losses(), MoEAuxLossAutoScaler.main_loss_backward_scale
    kept = dict(losses)
    losses.clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    try:
        yield
    finally:
        losses.clear()
        losses.update(kept)
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale


@contextlib.contextmanager
def _biases_of_shapes() -> Iterator[None]:
    """torch's causal bias holds a shape and no data; as a fake tensor it cannot be made."""
    made = sdpa.causal_lower_right

    def causal_lower_right(queries: int, keys: int) -> Any:
        with _disable_current_modes():
            return made(queries, keys)

    sdpa.causal_lower_right = causal_lower_right
    try:
        yield
    finally:
        sdpa.causal_lower_right = made


class FunctionsWithoutData(TorchFunctionMode):
    """Functions that would look at values, or at the device, before an operator is chosen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **kwargs)
        if func is torch.Tensor.numpy:
            return values.numpy_of(args[0])
        return func(*args, **kwargs)
