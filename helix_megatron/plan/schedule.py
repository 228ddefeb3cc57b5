"""Pipeline schedules, event by event, and the closed forms that rank thousands of layouts.

`simulate` runs the orders that megatron-core runs (pipeline_parallel/schedules.py): one forward one backward
(arXiv 2104.04473, figure 4, top), and its interleaved form (bottom), in which each stage holds several chunks
of layers. A micro-batch's forward needs the forward of the chunk before it, its backward the backward of the
chunk after it, each a message later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from helix_megatron.errors import HelixError


class Slot(NamedTuple):
    """One chunk of layers of one stage, forward or backward, for one micro-batch; seconds."""

    stage: int
    chunk: int
    micro_batch: int
    backward: bool
    start: float
    end: float


class Timeline(NamedTuple):
    """What `simulate` found. bubble: share of the time in which the busiest stage has nothing to do."""

    slots: tuple[Slot, ...]
    seconds: float
    bubble: float


def order_of(
    stage: int, stages: int, chunks: int, micro_batches: int
) -> list[tuple[bool, int, int]]:
    """(backward, chunk, micro-batch) in the order in which a stage runs them.

    Raises:
        HelixError: interleaved, with micro-batches that are no multiple of the stages.
    """
    if chunks > 1 and micro_batches % stages:
        raise HelixError(
            f"the interleaved schedule needs micro-batches ({micro_batches}) in multiples of the {stages} "
            "pipeline stages."
        )
    work = micro_batches * chunks

    def unit(index: int, backward: bool) -> tuple[bool, int, int]:
        """The index-th chunk forward or backward: rounds of `stages` micro-batches through all chunks."""
        if chunks == 1:
            return backward, 0, index
        round_, rest = divmod(index, stages * chunks)
        chunk, place = divmod(rest, stages)
        return backward, (chunks - 1 - chunk) if backward else chunk, round_ * stages + place

    warmup = stages - stage - 1
    if chunks > 1:  # as megatron-core: twice as deep, and one round of all chunks but the last
        warmup = 2 * warmup + (chunks - 1) * stages
    warmup = min(warmup, work)
    order = [unit(i, False) for i in range(warmup)]
    for i in range(work - warmup):
        order += [unit(warmup + i, False), unit(i, True)]
    return order + [unit(work - warmup + i, True) for i in range(warmup)]


def simulate(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]],
    micro_batches: int,
    message: float = 0.0,
) -> Timeline:
    """Run a pipeline.

    Args:
        forward, backward: seconds of [stage][chunk]; a backward of 0 everywhere is inference.
        micro_batches: of one step.
        message: seconds of sending activations to the next stage.

    Raises:
        HelixError: see `order_of`.
    """
    stages, chunks = len(forward), len(forward[0])
    orders = [order_of(s, stages, chunks, micro_batches) for s in range(stages)]
    if not any(map(any, backward)):
        orders = [[u for u in order if not u[0]] for order in orders]
    done: dict[tuple[bool, int, int], float] = {}  # (backward, virtual stage, micro-batch) → end
    waiting, free = [deque(order) for order in orders], [0.0] * stages
    slots: list[Slot] = []
    while any(waiting):
        before = len(slots)
        for stage, units in enumerate(waiting):
            while units:
                is_backward, chunk, batch = units[0]
                unit = is_backward, chunk * stages + stage, batch
                ready = _ready(done, *unit, stages * chunks, message)
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + (backward if is_backward else forward)[stage][chunk]
                done[unit] = free[stage] = end
                slots.append(Slot(stage, chunk, batch, is_backward, start, end))
                units.popleft()
        assert len(slots) > before, "the schedule waits for itself"
    seconds = max(free)
    busy = max(micro_batches * (sum(f) + sum(b)) for f, b in zip(forward, backward, strict=True))
    return Timeline(tuple(slots), seconds, 1 - busy / seconds)


def _ready(
    done: dict[tuple[bool, int, int], float],
    is_backward: bool,
    virtual: int,
    batch: int,
    last: int,
    message: float,
) -> float | None:
    """When what a unit needs has arrived; None while it has not been computed."""
    if is_backward:
        own = done.get((False, virtual, batch))
        if own is None:
            return None
        if virtual == last - 1:
            return own
        after = done.get((True, virtual + 1, batch))
        return None if after is None else max(own, after + message)
    if virtual == 0:
        return 0.0
    before = done.get((False, virtual - 1, batch))
    return None if before is None else before + message


def pipeline_seconds(
    per_stage: Sequence[float], micro_batches: int, chunks: int = 1, message: float = 0.0
) -> float:
    """Closed form of `simulate` for stages that take so many seconds forward and backward together.

    The slowest stage works on every micro-batch; before and after it the pipeline fills and drains, through one
    chunk of each of the others: sum + (micro-batches − 1) · slowest, with chunks c: slowest · micro-batches +
    (sum − slowest) / c (arXiv 2104.04473, section 2.2).
    """
    slowest = max(per_stage)
    hops = 2 * (len(per_stage) - 1) * message
    return slowest * micro_batches + (sum(per_stage) - slowest) / chunks + hops
