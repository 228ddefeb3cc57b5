"""The pipeline of one layout in time: as text, and as a trace for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from helix_megatron.plan.explain import duration, kinds_of_layers
from helix_megatron.plan.inference import decode_stage_seconds, prefill_seconds
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.results import Plan
from helix_megatron.plan.schedule import Timeline, simulate
from helix_megatron.plan.score import iteration, outer_cost
from helix_megatron.plan.steps import BACKWARD, FORWARD, in_order

# Micro-batches that a trace holds at most: the schedule repeats, and browsers have limits.
MOST_SLOTS = 20000
MICROSECONDS = 1e6


def timeline(plan: Plan, layout: Layout) -> Timeline:
    """The pipeline, event by event."""
    forward, backward, message = chunk_seconds(plan, layout)
    return simulate(forward, backward, shown_batches(plan, layout), message)


def shown_batches(plan: Plan, layout: Layout) -> int:
    """Micro-batches that are run event by event: the first of them, where a step has very many."""
    batches = layout.micro_batches(plan.job.global_batch)
    most = max(layout.pp, MOST_SLOTS // (2 * layout.pp * layout.vp) // layout.pp * layout.pp)
    return min(batches, most)


def chunk_seconds(plan: Plan, layout: Layout) -> tuple[list[list[float]], list[list[float]], float]:
    """(forward, backward) seconds of [stage][chunk], and those of a message: the terms of the prediction."""
    scenario, task = plan.scenario, plan.job.task
    if task != "train":
        seconds_of = prefill_seconds if task == "prefill" else decode_stage_seconds
        stages = [[seconds] for seconds in seconds_of(scenario, layout).stages]
        return stages, [[0.0]] * layout.pp, 0.0  # messages are waited for, inside the stages
    found = iteration(scenario, layout)
    ahead, back, recomputed, message = found.per_micro_batch
    cut, waits = layout.chunks(scenario.model.num_layers), message / 2 / layout.vp
    forward, backward = (
        [[seconds * own / found.layers + waits for own in chunks] for chunks in cut]
        for seconds in (ahead, back + recomputed)
    )
    first, last = (outer_cost(scenario, strip(layout), end) for end in (True, False))
    forward[0][0] += first.forward
    backward[0][0] += first.backward
    forward[-1][-1] += last.forward
    backward[-1][-1] += last.backward
    return forward, backward, found.hop


def pipeline_text(plan: Plan, layout: Layout, width: int = 100) -> str:
    """The pipeline drawn with letters: F forward, b backward, a dot where a stage waits."""
    if layout.pp == 1:
        return "\nNo pipeline: one stage.\n"
    found = timeline(plan, layout)
    batches, shown = layout.micro_batches(plan.job.global_batch), shown_batches(plan, layout)
    first = "" if shown == batches else f"first {shown} of "
    lines = [
        f"\nPipeline, event by event (simulated), {first}{batches} micro-batches: {duration(found.seconds)}, "
        f"bubble {found.bubble:.1%}. F forward, b backward, . waits"
    ]
    stages = range(layout.pp) if layout.pp <= 16 else [*range(8), *range(layout.pp - 8, layout.pp)]
    for stage in stages:
        row = ["."] * width
        for slot in found.slots:
            if slot.stage == stage:
                low = int(slot.start / found.seconds * width)
                high = max(low + 1, int(slot.end / found.seconds * width))
                row[low:high] = ["b" if slot.backward else "F"] * (min(high, width) - low)
        lines.append(f"  stage {stage:>3} {''.join(row[:width])}")
    return "\n".join(lines) + "\n"


def trace_json(plan: Plan, layout: Layout) -> dict[str, Any]:
    """Chrome's trace format: a process for each pipeline stage; operators of the first forward and backward."""
    found = timeline(plan, layout)
    events: list[dict[str, Any]] = []
    for stage in range(layout.pp):
        events.append(_name("process_name", stage, f"pipeline stage {stage} (simulated)"))
        for thread, name in ((0, "schedule"), (1, "operators"), (2, "communication")):
            events.append(_name("thread_name", stage, name, thread))
    detailed: set[tuple[int, bool]] = set()
    for slot in found.slots:
        phase = BACKWARD if slot.backward else FORWARD
        name = f"{phase} {slot.micro_batch}" + (f" chunk {slot.chunk}" if layout.vp > 1 else "")
        arguments = {"micro_batch": slot.micro_batch, "chunk": slot.chunk}
        seconds = slot.start, slot.end - slot.start
        events.append(_event(name, phase, slot.stage, 0, *seconds, arguments))
        if (slot.stage, slot.backward) not in detailed:
            detailed.add((slot.stage, slot.backward))
            events += _operators(plan, layout, slot.stage, phase, slot.start)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "simulated": True,
            "layout": layout.describe(),
            "model": plan.model.name,
            "cluster": plan.cluster.name,
            "micro_batches_of_the_step": layout.micro_batches(plan.job.global_batch),
            "micro_batches_shown": shown_batches(plan, layout),
        },
    }


def _operators(
    plan: Plan, layout: Layout, stage: int, phase: str, start: float
) -> Iterator[dict[str, Any]]:
    """The steps of one layer of each kind, one after the other; what is hidden runs beside."""
    now = start
    for layer, _, steps in kinds_of_layers(plan, layout):
        for step in in_order(steps, phase):
            arguments = {"layer": layer, "shape": step.shape, "flops": step.flops}
            arguments |= {"bytes_sent": step.sent, "axis": step.axis, "link": step.link}
            begin, thread = max(0.0, now - step.hidden), 2 if step.axis else 1
            yield _event(step.name, step.kind, stage, thread, begin, step.seconds, arguments)
            now += step.exposed


def _event(
    name: str, kind: str, process: int, thread: int, start: float, seconds: float, arguments: Any
) -> dict[str, Any]:
    where = {"name": name, "cat": kind, "ph": "X", "pid": process, "tid": thread}
    return where | {"ts": start * MICROSECONDS, "dur": seconds * MICROSECONDS, "args": arguments}


def _name(kind: str, process: int, name: str, thread: int = 0) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
