"""This process as one rank of a world in which collectives return at once and move nothing."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_moe_layer_wise_logging_tracker,
)
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from helix_megatron import parallel_state
from helix_megatron.errors import HelixError
from helix_megatron.graph import values
from helix_megatron.graph.attention_kernel import scaled_dot_product_attention
from helix_megatron.kernels import sdpa
from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.random import seed_model_parallel


@contextlib.contextmanager
def fake_world(rank: int, args: argparse.Namespace) -> Iterator[None]:
    """Rank `rank` of the groups that the flags describe.

    Raises:
        HelixError: this process belongs to a process group already.
    """
    if dist.is_initialized():
        raise HelixError(
            "this process belongs to a process group already, and tracing needs a fake one. Run helix graph "
            "in a process of its own, without torchrun."
        )
    dist.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    cpu_runtime.install()
    try:
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            intra_head_parallel_size=args.intra_head_parallel_size,
            create_gloo_process_groups=False,
        )
        seed_model_parallel(args.seed)
        with _fresh_router_losses(), _biases_of_shapes():
            yield
    finally:
        parallel_state.destroy_model_parallel()
        cpu_runtime.uninstall()
        dist.destroy_process_group()


@contextlib.contextmanager
def _fresh_router_losses() -> Iterator[None]:
    """What Megatron keeps of router losses from step to step, as a new process has it: nothing."""
    losses, scale = (
        get_moe_layer_wise_logging_tracker(),
        MoEAuxLossAutoScaler.main_loss_backward_scale,
    )
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
