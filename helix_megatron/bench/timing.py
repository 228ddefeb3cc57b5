"""Interleaved timing on the ranks of a process group, the statistics of its samples, and memory.

A machine that other programs use as well is slower at some times than at others. So the rivals take turns
(a, b, c, a, b, c, ...), their medians are compared, and so are the pairs of one turn.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

WARM_UP = 3


class Samples(NamedTuple):
    """wall: seconds from the start of the first to the end of the last rank; cpu: of all ranks together."""

    wall: list[float]
    cpu: list[float]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    steps: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = WARM_UP
) -> dict[str, Samples]:
    """Time every step `repeats` times, in turns, on all ranks of the world at once.

    Steps that differ between ranks must call the same collectives. Every rank gets the same samples.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()  # else hidden, where it is not to be used
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = torch.zeros(2, len(steps), repeats, dtype=torch.float64)
    gc.collect()
    gc.disable()
    try:
        for turn in range(-warm_up, repeats):
            for index, step in enumerate(steps.values()):
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                wait()
                dist.barrier()
                if turn >= 0:
                    seconds[0, index, turn] = time.perf_counter() - wall
                    seconds[1, index, turn] = time.process_time() - cpu
    finally:
        gc.enable()
    seconds = seconds.to("cuda" if on_gpu else "cpu")
    dist.all_reduce(seconds[0], dist.ReduceOp.MAX)
    dist.all_reduce(seconds[1], dist.ReduceOp.SUM)
    return dict(zip(steps, map(Samples, *seconds.tolist()), strict=True))


def compare(samples: Samples, other: Samples) -> dict[str, float]:
    """How many times as long as `other`: `medians`, `pairs` with its quartiles, and `cpu` (medians)."""
    pairs = Spread.of([a / b for a, b in zip(samples.wall, other.wall, strict=True)])
    return {
        "medians": statistics.median(samples.wall) / statistics.median(other.wall),
        "pairs": pairs.median,
        "pairs_low": pairs.low,
        "pairs_high": pairs.high,
        "cpu": statistics.median(samples.cpu) / statistics.median(other.cpu),
    }


def peak_memory() -> int:
    """Bytes of memory that this process has had at most, pages of mapped files included."""
    try:
        # Unlike getrusage's figure it does not begin with the memory of the process that started this one.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
