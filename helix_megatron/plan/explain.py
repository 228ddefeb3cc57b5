"""One layout, term by term: every operator of a layer, and how seconds and bytes add up. All simulated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helix_megatron.plan.inference import decode_steps, inference_software
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.memory import (
    expert_weights,
    layer_activations,
    layers_in_flight,
    optimizer_bytes,
    rank_weights,
)
from helix_megatron.plan.operators import layer_kinds, layer_steps
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step, in_order


def kinds_of_layers(plan: Plan, layout: Layout) -> Iterator[tuple[str, int, tuple[Step, ...]]]:
    """(name, how many, steps) of the kinds of layers that the model has."""
    model, sequence = plan.model, plan.job.sequence
    for experts, windowed, count in layer_kinds(model):
        name = ("MoE" if experts else "dense") + (" with window" if windowed else "")
        if plan.job.task == "decode":
            context = min(sequence, model.window or sequence) if windowed else sequence
            steps = decode_steps(
                model, strip(layout), context, plan.cluster, plan.software, experts
            )
        else:
            software = plan.software
            if plan.job.task == "prefill":
                software = inference_software(software)
            steps = layer_steps(model, layout, sequence, plan.cluster, software, experts, windowed)
            if plan.job.task == "prefill":
                steps = tuple(step for step in steps if step.phase == FORWARD)
        yield name, count, steps


def attention_times(plan: Plan, layout: Layout) -> tuple[float, float]:
    """(core attention, its exchange or stock's gather): seconds of one layer of the first kind, forward, one
    micro-batch."""
    _, _, steps = next(kinds_of_layers(plan, layout))
    forward = [step for step in steps if step.phase == FORWARD]
    core = sum(step.seconds for step in forward if step.kind == "attention")
    return core, sum(step.seconds for step in forward if step.axis in ("exchange", "qkv"))


def duration(seconds: float) -> str:
    """Four digits with the unit that suits: `1.234 s`, `12.34 ms`, `55.6 us`."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def explain(plan: Plan, layout: Layout) -> str:
    """The arithmetic of one layout."""
    p = plan.predict(layout)
    lines = [
        f"{layout.describe()}, micro-batch {layout.micro_batch}, {p.micro_batches} micro-batches, "
        f"recomputation {layout.recompute}"
        + (", sequence parallel" if layout.sequence_parallel else "")
        + ". All figures are simulated; bytes and FLOPs of one rank.",
        "",
    ]
    for name, count, steps in kinds_of_layers(plan, layout):
        lines += [f"{count} layers, {name}; one micro-batch:", *step_lines(steps), ""]
    core, exchange = attention_times(plan, layout)
    lines += [
        f"Attention of a layer, forward: {duration(core)} core + {duration(exchange)} exchange = "
        f"{duration(core + exchange)} (simulated)",
        "",
    ]
    lines += [*_seconds(plan, p), "", *memory_lines(plan, p), "", *_traffic(p)]
    return "\n".join(lines)


def step_lines(steps: Sequence[Step]) -> list[str]:
    """A line for every kernel and collective."""
    lines = [f"  {'phase':<9}{'operator':<34}{'shape':<44}{'GFLOP':>10}{'us':>10}{'hidden':>9}"]
    for phase in (FORWARD, BACKWARD):
        own = in_order(steps, phase)
        for step in own:
            hidden = f"{step.hidden * 1e6:.1f}" if step.hidden else ""
            lines.append(
                f"  {phase:<9}{step.name[:33]:<34}{(step.shape or step.kind)[:43]:<44}"
                f"{step.flops / 1e9:>10.2f}{step.seconds * 1e6:>10.1f}{hidden:>9}"
            )
        if own:
            exposed = sum(step.exposed for step in own)
            lines.append(f"  {phase:<9}{'= sum, hidden taken off':<88}{exposed * 1e6:>10.1f}")
    return lines


def _seconds(plan: Plan, p: Prediction) -> list[str]:
    layout, job = p.layout, plan.job
    what = {"train": "an iteration", "prefill": "until the first tokens", "decode": "a token"}
    lines = [f"{duration(p.seconds)} {what[job.task]} (simulated) ="]
    lines += [f"  {duration(seconds):>14}  {name}" for name, seconds in p.terms.items()]
    if job.task == "train":
        per = plan.model.num_layers / layout.pp
        lines.append(
            f"  layers: {p.micro_batches} micro-batches × {per:g} layers a stage × the sums above. Pipeline: "
            f"slowest stage × {p.micro_batches} + the others once"
            + (f" / {layout.vp} chunks" if layout.vp > 1 else "")
            + f"; bubble {p.bubble:.1%} of the step."
        )
    lines.append(
        f"  {p.tokens:,} tokens / {duration(p.seconds)} = {p.tokens_per_second:,.0f} tokens/s; "
        f"{p.model_flops / 1e12:,.2f} TFLOP of the model / {layout.gpus} GPUs / {duration(p.seconds)} = "
        f"{p.flops_per_gpu / 1e12:.0f} TFLOP/s a GPU"
    )
    return lines


def memory_lines(plan: Plan, p: Prediction) -> list[str]:
    """What the memory of the fullest GPU consists of."""
    layout, model, job = p.layout, plan.model, plan.job
    weights = rank_weights(model, layout) + expert_weights(model, layout)
    gb = {n: getattr(p.memory, n) / 1e9 for n in p.memory.__dataclass_fields__}
    lines = [
        f"{p.memory.total / 1e9:.2f} GB on the fullest GPU (simulated), of "
        f"{plan.cluster.chip.memory / 1e9:.0f} GB =",
        f"  {gb['weights']:>8.2f} GB  weights: {weights / 1e6:,.1f} M parameters",
    ]
    if job.task == "train":
        batches = layout.micro_batches(job.global_batch)
        activations = layer_activations(model, strip(layout), job, plan.software)
        flight = layers_in_flight(layout, model, batches)
        lines += [
            f"  {gb['gradients']:>8.2f} GB  gradients, fp32",
            f"  {gb['optimizer']:>8.2f} GB  Adam: {optimizer_bytes(plan.software)} bytes a parameter, on "
            f"{layout.dp_group.ranks} replicas",
            f"  {gb['activations']:>8.2f} GB  activations: {flight:g} layers in flight × "
            f"{activations.kept / 1e6:,.1f} MB (recomputation {layout.recompute}), and work space",
        ]
    else:
        lines += [
            f"  {gb['cache']:>8.2f} GB  key-value cache",
            f"  {gb['activations']:>8.2f} GB  work space of a micro-batch",
        ]
    lines.append(f"  {gb['framework']:>8.2f} GB  CUDA, NCCL, fragments (assumed)")
    return lines


def _traffic(p: Prediction) -> list[str]:
    lines = [
        f"Communication of one rank: {duration(p.exposed)} exposed, {duration(p.hidden)} hidden",
        f"  {'axis':<10}{'collective':<16}{'link':<18}{'MB sent':>14}{'time':>13}{'exposed':>13}",
    ]
    for t in p.traffic:
        lines.append(
            f"  {t.axis:<10}{t.kind:<16}{t.link:<18}{t.bytes / 1e6:>14,.3f}{duration(t.seconds):>13}"
            f"{duration(t.exposed):>13}"
        )
    return lines
