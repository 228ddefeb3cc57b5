"""The process groups of a run: torch.distributed's, Megatron's and Helix's."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from helix_megatron import parallel_state
from helix_megatron.megatron import cpu_runtime
from helix_megatron.run.config import RunConfig
from helix_megatron.run.rank_environment import rendezvous
from helix_megatron.run.settings import Parallelism

LEAVE_SECONDS = 60.0


@contextlib.contextmanager
def process_group(parallel: Parallelism) -> Iterator[None]:
    """torch.distributed for the run, with its timeout on every group."""
    cpu_runtime.install()
    on_gpu = torch.cuda.is_available() and parallel.distributed_backend != "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = parallel.distributed_backend
    if backend == "auto":
        backend = "nccl" if on_gpu else "gloo"
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, **rendezvous())
    try:
        yield
        _leave_together()
    finally:
        dist.destroy_process_group()


def _leave_together() -> None:
    """Wait until all ranks are here: who closes its connections first fails a barrier that others are still in.

    Through the store, which has no such connections. The first rank may keep it, and goes last.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, ranks = dist.get_rank(), range(1, dist.get_world_size())
    timeout = datetime.timedelta(seconds=LEAVE_SECONDS)
    with contextlib.suppress(RuntimeError):  # somebody else has failed: its message is enough
        store.set(f"helix/done/{rank}", "")
        store.wait([f"helix/done/{other}" for other in (0, *ranks)], timeout)
        if rank == 0 and ranks:
            store.wait([f"helix/left/{other}" for other in ranks], timeout)
        else:
            store.set(f"helix/left/{rank}", "")


def initialize_groups(run: RunConfig) -> None:
    """Megatron's process groups and Helix's. Collective."""
    parallel = run.parallel
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=run.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        intra_head_parallel_size=run.helix.intra_head_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
