"""Communication of one rank in one step: bytes, seconds, and what of them is not hidden, by axis and kind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.hardware import GRADIENT_BYTES
from helix_megatron.plan.collective_time import Group, collective_seconds
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import layer_kinds, layer_steps, outer_steps
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step


@dataclass(frozen=True)
class Traffic:
    """Collectives of one axis and kind, of one rank in one step: bytes sent, seconds, seconds not hidden."""

    axis: str
    kind: str
    link: str
    bytes: float
    seconds: float
    exposed: float


class _Sums:
    """Traffic, added up."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], list[float]] = {}

    def add(
        self,
        key: tuple[str, str, str],
        sent: float,
        seconds: float,
        exposed: float,
        times: float = 1,
    ) -> None:
        row = self.rows.setdefault(key, [0.0, 0.0, 0.0])
        for i, value in enumerate((sent, seconds, exposed)):
            row[i] += times * value

    def step(self, step: Step, times: float) -> None:
        self.add((step.axis, step.kind, step.link), step.sent, step.seconds, step.exposed, times)

    def traffic(self) -> tuple[Traffic, ...]:
        return tuple(Traffic(*key, *values) for key, values in self.rows.items() if values[0])


def traffic_of(
    steps: Iterable[tuple[Step, float]], others: Iterable[Traffic] = ()
) -> tuple[Traffic, ...]:
    """Of steps that run so many times, beside others."""
    sums = _Sums()
    for row in others:
        sums.add((row.axis, row.kind, row.link), row.bytes, row.seconds, row.exposed)
    for step, times in steps:
        if step.axis:
            sums.step(step, times)
    return sums.traffic()


def layer_traffic(
    scenario: Scenario,
    layout: Layout,
    batches: int,
    phases: tuple[str, ...] = (FORWARD, BACKWARD),
) -> tuple[Traffic, ...]:
    """Of the layers of one stage alone."""
    sums = _Sums()
    _add_layers(sums, scenario, layout, batches, phases)
    return sums.traffic()


def _add_layers(
    sums: _Sums, scenario: Scenario, layout: Layout, batches: int, phases: tuple[str, ...]
) -> None:
    stripped, model = strip(layout), scenario.model
    for experts, windowed, count in layer_kinds(model):
        for step in layer_steps(scenario, stripped, experts, windowed):
            if not step.axis or step.phase not in phases:
                continue
            again = layout.recompute == "full" or (
                layout.recompute == "selective" and step.axis in layout.core_axes
            )
            times = 2 if again and step.phase == FORWARD else 1
            sums.step(step, times * batches * count / layout.pp)


def message_bytes(model: ModelSpec, layout: Layout, job: Job, software: Software) -> float:
    """Bytes that a rank sends to the next pipeline stage per micro-batch."""
    tokens = layout.micro_batch * job.sequence / layout.cp
    cut = layout.tp if layout.sequence_parallel or software.scatter_gather else 1
    return tokens * model.hidden_size * software.element / cut


def messages_sent(layout: Layout, stage: int) -> int:
    """Messages that a rank of a stage sends per micro-batch: forward of every chunk but the model's last,
    backward of every chunk but its first."""
    ends = (stage == 0) + (stage == layout.pp - 1)
    return 2 * layout.vp - ends if layout.pp > 1 else 0


def final_reductions(
    model: ModelSpec, layout: Layout, stage: int | None = None
) -> list[tuple[str, float, Group]]:
    """(axis, bytes, group) of what is summed once a step, after the last backward (finalize_model_grads of
    megatron-core): gradients of weights that all tensor parallel ranks hold, and of tied embeddings.

    On one pipeline stage, or without one the most on any.
    """
    last = stage in (None, layout.pp - 1)
    found = []
    if layout.sequence_parallel:
        here = model.experts / layout.ep if model.experts and layout.etp == 1 else 0.0
        held = model.replicated_parameters(here) / layout.pp
        held += model.norm_parameters if last else 0.0
        found.append(("tp", held * GRADIENT_BYTES, layout.tp_group))
    if model.qk_norm:
        per_layer = 2 * model.head_dim * (1 if model.rms_norm else 2)
        size = per_layer * model.num_layers / layout.pp * GRADIENT_BYTES
        found.append(("tp", size, layout.tp_group))
    if layout.pp > 1 and model.tied and (last or stage == 0):
        rows = model.padded_vocab(layout.tp) / layout.tp
        ends = Group(2, layout.pp_group.stride * (layout.pp - 1))
        found.append(("pp", rows * model.hidden_size * GRADIENT_BYTES, ends))
    return found


def stage_traffic(
    scenario: Scenario,
    layout: Layout,
    batches: int,
    *,
    stage: int,
    data_parallel: tuple[tuple[float, float, float], tuple[float, float, float]],
    hop: float,
    message: float,
) -> tuple[Traffic, ...]:
    """Of a rank of one pipeline stage in one training iteration.

    Args:
        data_parallel: (bytes, seconds, exposed seconds) of reducing gradients and of gathering weights.
        hop: seconds of one message; message: those that a micro-batch waits for.
    """
    sums, (model, job, cluster, software) = _Sums(), scenario
    _add_layers(sums, scenario, layout, batches, (FORWARD, BACKWARD))
    for first, where in ((True, 0), (False, layout.pp - 1)):
        if stage == where:
            for step in outer_steps(scenario, strip(layout), first=first):
                if step.axis:
                    sums.step(step, batches)
    count = messages_sent(layout, stage) * batches
    if count:
        size = count * message_bytes(model, layout, job, software)
        link = layout.pp_group.link(cluster)
        sums.add(("pp", "send", link), size, count * hop, min(count * hop, message * batches))
    for axis, size, group in final_reductions(model, layout, stage):
        seconds = collective_seconds(cluster, "all-reduce", size, group)
        sent = sent_bytes("all-reduce", size, group.ranks)
        sums.add((axis, "all-reduce", group.link(cluster)), sent, seconds, seconds)
    names = ("reduce-scatter" if software.distributed_optimizer else "all-reduce", "all-gather")
    for name, (size, seconds, exposed) in zip(names, data_parallel, strict=True):
        sums.add(("dp", name, layout.dp_group.link(cluster)), size, seconds, exposed)
    return sums.traffic()
