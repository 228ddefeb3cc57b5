"""Predicted seconds, memory and communication of one training layout. All of it is simulated."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from helix_megatron import hardware as hw
from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.collective_time import collective_seconds, point_to_point_seconds
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.memory import (
    Memory,
    expert_weights,
    optimizer_bytes,
    rank_weights,
    training_memory,
    training_states,
)
from helix_megatron.plan.models import ModelSpec
from helix_megatron.plan.operators import (
    attention_part,
    layer_kinds,
    mixer_steps,
    mlp_part,
    mlp_steps,
    outer_steps,
)
from helix_megatron.plan.schedule import pipeline_seconds
from helix_megatron.plan.settings import Scenario, Software
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step
from helix_megatron.plan.traffic import Traffic, final_reductions, message_bytes, stage_traffic


@dataclass(frozen=True)
class Prediction:
    """One layout, predicted.

    seconds: of a training iteration; until the first token of every prompt (prefill); of a token of each
    sequence (decode). terms: named seconds that add up to it. bubble: share of the time in which the busiest
    pipeline stage waits. traffic: of a rank of the last pipeline stage; in inference with
    the messages that the first sends.
    """

    layout: Layout
    seconds: float
    tokens: int
    memory: Memory
    terms: dict[str, float]
    traffic: tuple[Traffic, ...]
    bubble: float
    model_flops: float
    micro_batches: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return sum(t.exposed for t in self.traffic)

    @property
    def hidden(self) -> float:
        return sum(t.seconds - t.exposed for t in self.traffic)

    @property
    def flops_per_gpu(self) -> float:
        """Model FLOP/s of one GPU."""
        return self.model_flops / self.seconds / self.layout.gpus


class Cost(NamedTuple):
    """Exposed seconds of all layers of a model; attention: core attention and its exchange, forward, which
    selective recomputation repeats. gpu: forward and backward, if the GPU never waited for its host."""

    forward: float = 0.0
    backward: float = 0.0
    attention: float = 0.0
    gpu: tuple[float, float] = (0.0, 0.0)


@functools.lru_cache(maxsize=16384)
def layers_cost(scenario: Scenario, stripped: Layout) -> Cost:
    """All layers of the model, one micro-batch."""
    forward = backward = core = 0.0
    part = attention_part(stripped)
    operators = {FORWARD: 0, BACKWARD: 0}
    for kind in layer_kinds(scenario.model):
        of_mixer = mixer_steps(scenario, part, kind.mixer)
        of_mlp = mlp_steps(scenario, mlp_part(stripped), kind.mlp)
        mixer, mlp = _cost(of_mixer, part.core_axes), _cost(of_mlp)
        forward += kind.layers * (mixer.forward + mlp.forward)
        backward += kind.layers * (mixer.backward + mlp.backward)
        core += kind.layers * mixer.attention
        for step in (*of_mixer, *of_mlp):
            operators[step.phase] += kind.layers
    # The host runs ahead of the GPU where it can: the slower of the two sets the pace.
    ahead, back = (scenario.host_seconds * operators[phase] for phase in (FORWARD, BACKWARD))
    return Cost(max(forward, ahead), max(backward, back), core, (forward, backward))


@functools.lru_cache(maxsize=16384)
def outer_cost(scenario: Scenario, stripped: Layout, first: bool) -> Cost:
    """The embedding, or the output and the loss, one micro-batch."""
    return _cost(outer_steps(scenario, stripped, first=first))


def _cost(steps: Iterable[Step], core_axes: Container[str] = ()) -> Cost:
    forward = backward = attention = 0.0
    for step in steps:
        exposed = step.seconds - step.hidden
        if step.phase == BACKWARD:
            backward += exposed
            continue
        forward += exposed
        if step.kind == "attention" or step.axis in core_axes:
            attention += exposed
    return Cost(forward, backward, attention)


class Iteration(NamedTuple):
    """What `predict_training` and the search share: seconds, and the parts that reports name.

    layers, per_micro_batch: of the busiest stage; forward, backward, recomputed and message, without embedding
    and loss. waits: the part of the first three in which the GPU waits for its host.
    """

    seconds: float
    layers: int
    pipeline: float
    busy: float
    per_micro_batch: tuple[float, float, float, float]
    hop: float
    data_parallel: tuple[tuple[float, float, float], tuple[float, float, float]]
    final: float
    optimizer: float
    batches: int
    waits: tuple[float, float, float]


def iteration(scenario: Scenario, layout: Layout) -> Iteration:
    """Seconds of one training iteration."""
    model, job, cluster, software = scenario
    stripped = strip(layout)
    batches = layout.micro_batches(job.global_batch)
    cost = layers_cost(scenario, stripped)
    first, last = (outer_cost(scenario, stripped, end) for end in (True, False))
    again = {"none": 0.0, "selective": cost.attention, "full": cost.forward}[layout.recompute]
    ahead, back = cost.forward - cost.gpu[0], cost.backward - cost.gpu[1]
    dealt = layout.stages(model.num_layers)
    all_layers = (cost.forward + cost.backward + again) / model.num_layers
    message, hop = messages(scenario, layout, all_layers * min(dealt))
    if layout.first or layout.last:
        per_stage = [own * all_layers + message for own in dealt]
    else:
        per_stage = [dealt[0] * all_layers + message] * layout.pp
    per_stage[0] += first.forward + first.backward
    per_stage[-1] += last.forward + last.backward
    slowest = max(per_stage)
    own = dealt[per_stage.index(slowest)]
    share = own / model.num_layers
    forward, backward, recomputed = cost.forward * share, cost.backward * share, again * share
    pipeline = pipeline_seconds(per_stage, batches, layout.vp, hop)
    room = hw.OVERLAP_ROOM * layout.vp if software.dp_overlap else 0.0
    reduced, gathered = _data_parallel(model, layout.degrees, cluster, software)
    exposed_reduced = max(0.0, reduced[1] - room * (backward + recomputed))
    exposed_gathered = max(0.0, gathered[1] - room * forward)
    optimizer = _optimizer_seconds(model, layout, cluster, software)
    exposed = exposed_reduced + exposed_gathered
    summed = final_reductions(model, layout)
    final = sum(collective_seconds(cluster, "all-reduce", size, group) for _, size, group in summed)
    return Iteration(
        seconds=pipeline + exposed + final + optimizer + hw.ITERATION_OVERHEAD,
        layers=own,
        pipeline=pipeline,
        busy=slowest * batches,
        per_micro_batch=(forward, backward, recomputed, message),
        hop=hop,
        data_parallel=((*reduced, exposed_reduced), (*gathered, exposed_gathered)),
        final=final,
        optimizer=optimizer,
        batches=batches,
        waits=(share * ahead, share * back, share * ahead * (layout.recompute == "full")),
    )


def predict_training(scenario: Scenario, layout: Layout, stage: int | None = None) -> Prediction:
    """One training iteration, with everything that reports show; traffic of a rank of the last stage, or of
    the stage that is named."""
    model, job, _, software = scenario
    found, tokens = iteration(scenario, layout), job.global_batch * job.sequence
    batches = found.batches
    *layers, message = found.per_micro_batch
    forward, backward, recomputed = (a - b for a, b in zip(layers, found.waits, strict=True))
    terms = {
        "layers, forward": batches * forward,
        "layers, backward": batches * backward,
        "recomputation": batches * recomputed,
        "waiting for the host": batches * sum(found.waits),
        "embedding, output and loss": found.busy - batches * sum(found.per_micro_batch),
        "pipeline messages, exposed": batches * message,
        "pipeline bubble": found.pipeline - found.busy,
        "data parallel, exposed": sum(row[2] for row in found.data_parallel),
        "gradients of norms and tied embeddings": found.final,
        "optimizer": found.optimizer,
        "host, once": hw.ITERATION_OVERHEAD,
    }
    traffic = stage_traffic(
        scenario,
        layout,
        batches,
        stage=layout.pp - 1 if stage is None else stage,
        data_parallel=found.data_parallel,
        hop=found.hop,
        message=message,
    )
    return Prediction(
        layout=layout,
        seconds=found.seconds,
        tokens=tokens,
        memory=training_memory(model, layout, job, software),
        terms=terms,
        traffic=traffic,
        bubble=(found.pipeline - found.busy) / found.seconds,
        model_flops=model.flops_per_token(job.sequence) * tokens,
        micro_batches=batches,
    )


# ------------------------------------------------------------------------------ parts


def messages(scenario: Scenario, layout: Layout, layers: float) -> tuple[float, float]:
    """(seconds of messages that each micro-batch waits for on a stage, seconds of one message)."""
    if layout.pp == 1:
        return 0.0, 0.0
    model, job, cluster, software = scenario
    size = message_bytes(model, layout, job, software)
    hop = point_to_point_seconds(cluster, size, layout.pp_group)
    if software.scatter_gather and not layout.sequence_parallel:
        hop += collective_seconds(cluster, "all-gather", size * layout.tp, layout.tp_group)
    if layout.vp > 1:  # overlapped with the other chunks, as far as they last
        return max(0.0, 2 * layout.vp * hop - layers), hop
    return 2 * hop, hop


@functools.lru_cache(maxsize=16384)
def _data_parallel(
    model: ModelSpec, layout: Layout, cluster: Cluster, software: Software
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(bytes, seconds) of reducing gradients, and of gathering weights, on the stage with most weights."""
    kind = "reduce-scatter" if software.distributed_optimizer else "all-reduce"
    wanted = [(kind, software.gradient_bytes)]
    if software.distributed_optimizer:
        wanted.append(("all-gather", software.weight_bytes))
    parts = [(rank_weights(model, layout), layout.dp_group)]
    if model.experts:
        parts.append((expert_weights(model, layout), layout.expert_dp_group))
    found = [(0.0, 0.0), (0.0, 0.0)]
    for place, (name, width) in enumerate(wanted):
        size = sum(sent_bytes(name, n * width, group.ranks) for n, group in parts)
        seconds = sum(collective_seconds(cluster, name, n * width, group) for n, group in parts)
        found[place] = (size, seconds)
    return found[0], found[1]


def _optimizer_seconds(
    model: ModelSpec, layout: Layout, cluster: Cluster, software: Software
) -> float:
    states = training_states(model, layout, software).optimizer / optimizer_bytes(software)
    return states * hw.OPTIMIZER_TRAFFIC / (cluster.chip.memory_bandwidth * hw.MEMORY_EFFICIENCY)
