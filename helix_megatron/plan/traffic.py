"""Communication of one rank in one step: bytes, seconds, and what of them is not hidden, by axis and kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.hardware import GRADIENT_BYTES
from helix_megatron.plan.collective_time import Group, collective_seconds
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import layer_kinds, layer_steps, outer_steps
from helix_megatron.plan.settings import Job, Scenario, Software
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step


class Traffic(NamedTuple):
    """Collectives of one axis and kind, of one rank in one step: bytes sent, seconds, seconds not hidden."""

    axis: str
    kind: str
    link: str
    bytes: float
    seconds: float
    exposed: float

    @classmethod
    def of(cls, step: Step, times: float) -> Traffic:
        """Of a step that runs so many times."""
        amounts = (times * amount for amount in (step.sent, step.seconds, step.exposed))
        return cls(step.axis, step.kind, step.link, *amounts)


def added(rows: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """Those of one axis, kind and link added up, where anything is sent."""
    sums: dict[tuple[str, str, str], list[float]] = {}
    for *key, sent, seconds, exposed in rows:
        total = sums.setdefault((key[0], key[1], key[2]), [0.0, 0.0, 0.0])
        for i, amount in enumerate((sent, seconds, exposed)):
            total[i] += amount
    return tuple(Traffic(*key, *total) for key, total in sums.items() if total[0])


def traffic_of(steps: Iterable[tuple[Step, float]]) -> Iterator[Traffic]:
    """Of the collectives among steps that run so many times."""
    return (Traffic.of(step, times) for step, times in steps if step.axis)


def layer_traffic(
    scenario: Scenario,
    layout: Layout,
    batches: int,
    phases: tuple[str, ...] = (FORWARD, BACKWARD),
    stage: int = -1,
) -> Iterator[Traffic]:
    """Of the layers of one stage alone, the last unless another is named."""
    stripped, model = strip(layout), scenario.model
    share = layout.stages(model.num_layers)[stage] / model.num_layers
    for kind in layer_kinds(model):
        for step in layer_steps(scenario, stripped, kind):
            if not step.axis or step.phase not in phases:
                continue
            core = step.axis in layout.core_axes
            again = layout.recompute == "full" or (layout.recompute == "selective" and core)
            times = 2 if again and step.phase == FORWARD else 1
            yield Traffic.of(step, times * batches * kind.layers * share)


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
    dealt = layout.stages(model.num_layers)
    share = (max(dealt) if stage is None else dealt[stage]) / model.num_layers
    found = []
    if layout.sequence_parallel:
        here = model.experts / layout.ep if model.experts and layout.etp == 1 else 0.0
        held = model.replicated_parameters(here) * share
        held += model.norm_parameters if last else 0.0
        found.append(("tp", held * GRADIENT_BYTES, layout.tp_group))
    if model.norms_queries:
        per_layer = 2 * model.head_dim * model.norm_tensors
        size = per_layer * model.num_layers * share * GRADIENT_BYTES
        found.append(("tp", size, layout.tp_group))
    if layout.pp > 1 and model.embeddings == 1 and (last or stage == 0):
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
    model, job, cluster, software = scenario
    rows = list(layer_traffic(scenario, layout, batches, stage=stage))
    for first, where in ((True, 0), (False, layout.pp - 1)):
        if stage == where:
            steps = outer_steps(scenario, strip(layout), first=first)
            rows += traffic_of((step, batches) for step in steps)
    count = messages_sent(layout, stage) * batches
    if count:
        size = count * message_bytes(model, layout, job, software)
        waited = min(count * hop, message * batches)
        rows.append(Traffic("pp", "send", layout.pp_group.link(cluster), size, count * hop, waited))
    for axis, size, group in final_reductions(model, layout, stage):
        seconds = collective_seconds(cluster, "all-reduce", size, group)
        sent = sent_bytes("all-reduce", size, group.ranks)
        rows.append(Traffic(axis, "all-reduce", group.link(cluster), sent, seconds, seconds))
    names = ("reduce-scatter" if software.distributed_optimizer else "all-reduce", "all-gather")
    link = layout.dp_group.link(cluster)
    rows += [Traffic("dp", n, link, *row) for n, row in zip(names, data_parallel, strict=True)]
    return added(rows)
