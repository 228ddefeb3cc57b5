"""What the ranks of `bench layouts` do: train some iterations, timed, and say what they measured."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from typing import Any, NamedTuple

from helix_megatron.bench.timing import peak_memory
from helix_megatron.run.config import RunConfig

PRODUCT_REPEATS = 5
# A matrix product that keeps a device busy without keeping the user waiting: rows, columns, inner.
PRODUCT_SIZES = {"cpu": 768, "cuda": 8192}


class Measured(NamedTuple):
    """One launch of one layout.

    seconds: of each timed iteration, from the first rank's start to the last one's end. exposed, total:
    seconds of an iteration in which a rank's computation waits for communication, and in which a collective
    of it runs, means over the ranks; the latter come from iterations of their own, because timing takes
    away overlap. sent_bytes: of the rank that sends most, per iteration, attention's exchange first.
    memory_bytes: of the fullest rank: on a GPU the peak of its tensors, on the CPU the peak of what its
    process grew by. loss: of the last iteration. product_flops: of all ranks in large matrix products at the
    same time, FLOP per second.
    """

    seconds: list[float]
    exposed: list[float]
    total: list[float]
    sent_bytes: tuple[float, float]
    memory_bytes: int
    loss: float
    product_flops: float
    device: str


def measure_layout(run: RunConfig, warm_up: int, iterations: int) -> Measured:
    """Train on this rank; the measurements of all ranks together. The environment is a launcher's."""
    import torch.distributed as dist

    from helix_megatron import parallel_state
    from helix_megatron.core.meter import Meter
    from helix_megatron.megatron.process_group import process_group
    from helix_megatron.training.metrics import memory_bytes
    from helix_megatron.training.pretrain import training

    # Each launch would print the optional packages again.
    with contextlib.redirect_stdout(io.StringIO()), process_group(run.parallel):
        flops, device = _product_flops(run)
        before = memory_bytes()
        meter = Meter("exposed")
        records: list[Any] = []
        for metrics in training(run, meter=meter):
            records.append(metrics)
            if len(records) == warm_up + iterations:
                meter.timing = "total"
            dist.barrier()
        timed = records[warm_up:]
        tokens, first = run.tokens_per_iteration, timed[0]
        own = (
            [record.iteration_ms / 1e3 for record in timed],
            [record.comm_ms_per_token * tokens / 1e3 for record in timed],
            (first.attention_bytes_per_token * tokens, first.other_bytes_per_token * tokens),
            _peak_bytes(before),
            flops,
        )
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    seconds, waiting, sent, memory, products = zip(*ranks, strict=True)
    waits = [statistics.fmean(of_ranks) for of_ranks in zip(*waiting, strict=True)]
    return Measured(
        seconds=[max(of_ranks) for of_ranks in zip(*seconds, strict=True)][:iterations],
        exposed=waits[:iterations],
        total=waits[iterations:],
        sent_bytes=max(sent, key=sum),
        memory_bytes=max(memory),
        loss=records[-1].lm_loss,
        product_flops=sum(products),
        device=device,
    )


def _peak_bytes(before: int) -> int:
    """Of this rank's tensors on its GPU; on the CPU, of what its process grew by since it held `before`."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return peak_memory() - before


def _product_flops(run: RunConfig) -> tuple[float, str]:
    """FLOP per second of this rank in a large product, while all ranks compute one; the device's name."""
    import platform

    import torch
    import torch.distributed as dist

    from helix_megatron.megatron.gpt import parameter_dtype

    on_gpu = torch.cuda.is_available() and run.parallel.distributed_backend != "gloo"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = parameter_dtype(run.training)
    size = PRODUCT_SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    dist.barrier()
    start = time.perf_counter()
    for _ in range(PRODUCT_REPEATS):
        a @ b
    if on_gpu:
        torch.cuda.synchronize()
    flops = PRODUCT_REPEATS * 2 * size**3 / (time.perf_counter() - start)
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU"
    return flops, name
