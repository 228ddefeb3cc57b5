"""This process as one rank of a world in which collectives return at once and move nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from helix_megatron import parallel_state
from helix_megatron.errors import HelixError
from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.random import seed_model_parallel


@contextlib.contextmanager
def fake_world(
    rank: int,
    ranks: int,
    tensor_parallel: int,
    pipeline_parallel: int = 1,
    seed: int = 1,
    **sizes: int,
) -> Iterator[None]:
    """Rank `rank` of so many, with all groups.

    Args:
        sizes: further arguments of `parallel_state.initialize_model_parallel`.

    Raises:
        HelixError: this process belongs to a process group already.
    """
    if dist.is_initialized():
        raise HelixError(
            "this process belongs to a process group already, and tracing needs a fake one. Trace in a "
            "process of its own (helix graph, helix bench traffic), without torchrun."
        )
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    cpu_runtime.install()
    try:
        parallel_state.initialize_model_parallel(
            tensor_parallel, pipeline_parallel, create_gloo_process_groups=False, **sizes
        )
        seed_model_parallel(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        cpu_runtime.uninstall()
        dist.destroy_process_group()
