"""One layout, term by term: the tables and sentences of `--explain`, `helix simulate` and the deployment plan.

All of it is simulated. A table is (head, rows); the terminal and the page print the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helix_megatron.plan import memory
from helix_megatron.plan.inference import decode_steps, for_inference
from helix_megatron.plan.layouts import Layout, strip
from helix_megatron.plan.operators import layer_kinds, layer_steps
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.plan.steps import BACKWARD, FORWARD, Step, in_order
from helix_megatron.tables import text_table

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
A_STEP = {
    "train": "an iteration",
    "prefill": "until the first tokens of the batch",
    "decode": "a token of every sequence",
}


def kinds_of_layers(plan: Plan, layout: Layout) -> Iterator[tuple[str, int, tuple[Step, ...]]]:
    """(name, how many, steps) of the kinds of layers that the model has."""
    model, sequence = plan.model, plan.job.sequence
    for kind in layer_kinds(model):
        if plan.job.task == "decode":
            windowed = kind.mixer == "window"
            context = min(sequence, model.window_size or sequence) if windowed else sequence
            steps = decode_steps(plan.scenario, strip(layout), context, kind)
        elif plan.job.task == "prefill":
            steps = layer_steps(for_inference(plan.scenario), layout, kind)
            steps = tuple(step for step in steps if step.phase == FORWARD)
        else:
            steps = layer_steps(plan.scenario, layout, kind)
        yield kind.name(model), kind.layers, steps


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
    """The arithmetic of one layout, for the terminal."""
    p = plan.predict(layout)
    core, exchange = attention_times(plan, layout)
    parts = [
        f"{layout.describe()}, micro-batch {layout.micro_batch}, {p.micro_batches} micro-batches, "
        f"recomputation {layout.recompute}"
        + (", sequence parallel" if layout.sequence_parallel else "")
        + ". All figures are simulated; bytes and FLOPs of one rank."
    ]
    for name, count, steps in kinds_of_layers(plan, layout):
        operators = text_table(*operators_table(steps, layout.tp), left=3)
        parts.append(f"{count} layers, {name}; one micro-batch:\n{operators}")
    parts += [
        f"Attention of a layer, forward: {duration(core)} core + {duration(exchange)} exchange = "
        f"{duration(core + exchange)} (simulated)",
        f"{speed_text(plan, p)}\n{text_table(*terms_table(p))}",
    ]
    if plan.job.task == "train":
        parts.append(pipeline_text(plan, p))
    parts += [
        f"{memory_text(plan, p)}\n{text_table(*memory_table(plan, p), left=2)}",
        f"Communication of one rank: {duration(p.exposed)} exposed, {duration(p.hidden)} hidden\n"
        + text_table(*traffic_table(p), left=3),
    ]
    return "\n\n".join(parts)


# --------------------------------------------------------------------------- sentences


def speed_text(plan: Plan, p: Prediction) -> str:
    """How fast a step is, and what of it is communication."""
    return (
        f"{duration(p.seconds)} {A_STEP[plan.job.task]} (simulated), {p.tokens_per_second:,.0f} tokens/s, "
        f"{p.flops_per_gpu / 1e12:.0f} TFLOP/s a GPU ({p.model_flops / p.tokens / 1e9:.2f} GFLOP of the model "
        f"a token), bubble {p.bubble:.1%}, communication {duration(p.exposed)} exposed and "
        f"{duration(p.hidden)} hidden."
    )


def pipeline_text(plan: Plan, p: Prediction) -> str:
    """How the layers' sums make a step."""
    dealt, vp = p.layout.stages(plan.model.num_layers), p.layout.vp
    layers = str(dealt[0]) if len({*dealt}) == 1 else ", ".join(map(str, dealt))
    chunks = f" / {vp} chunks" if vp > 1 else ""
    return (
        f"{p.micro_batches} micro-batches × {layers} layers a stage × the sums above. Pipeline: slowest "
        f"stage × {p.micro_batches} + the others once{chunks}."
    )


def memory_text(plan: Plan, p: Prediction) -> str:
    """How much of the fullest GPU is used."""
    used, capacity = p.memory.total / 1e9, plan.cluster.chip.memory / 1e9
    text = f"{used:.2f} GB on the fullest GPU (simulated), of {capacity:.0f} GB."
    most = used + (p.memory.framework_range[1] - p.memory.framework) / 1e9
    if most > capacity:
        text += f" It may be {most:.1f} GB with fragments and NCCL, which would not fit."
    return text


# ------------------------------------------------------------------------------ tables


def operators_table(steps: Sequence[Step], ranks: int) -> Table:
    """Every kernel and collective of a layer, with the sums of each direction.

    MB of kernels are read and written in GPU memory; those of collectives are sent.
    """
    rows = []
    for phase in (FORWARD, BACKWARD):
        own = in_order(steps, phase)
        for step in own:
            moved = f"{(step.sent or step.moved) / 1e6:,.2f}"
            hidden = f"{step.hidden * 1e6:,.1f}" if step.hidden else ""
            figures = f"{step.flops / 1e9:,.2f}", moved, f"{step.seconds * 1e6:,.1f}", hidden
            rows.append((phase, step.name, step.shape or step.kind, *figures))
        if own:
            flops, sent = sum(step.flops for step in own), sum(step.sent for step in own)
            everywhere = f"{flops * ranks / 1e9:,.0f} GFLOP on all {ranks} TP ranks"
            seconds = f"{sum(step.exposed for step in own) * 1e6:,.1f}"
            figures = f"{flops / 1e9:,.2f}", f"{sent / 1e6:,.2f} sent", seconds, ""
            rows.append((phase, "= sum, hidden taken off", everywhere, *figures))
    return ("phase", "operator", "shape", "GFLOP", "MB", "us", "hidden us"), rows


def terms_table(p: Prediction) -> Table:
    """What the seconds of a step consist of."""
    return ("part", "time"), [(name, duration(seconds)) for name, seconds in p.terms.items()]


def memory_table(plan: Plan, p: Prediction) -> Table:
    """What the memory of the fullest GPU consists of."""
    layout, model, job = p.layout, plan.model, plan.job
    weights = memory.rank_weights(model, layout) + memory.expert_weights(model, layout)
    what = {"weights": f"{weights / 1e6:,.1f} M parameters"}
    if job.task == "train":
        activations = memory.layer_activations(model, strip(layout), job, plan.software)
        flight = memory.layers_in_flight(layout, model, layout.micro_batches(job.global_batch))
        adam, replicas = memory.optimizer_bytes(plan.software), layout.dp_group.ranks
        kept = f"{flight:g} layers in flight × {activations.kept / 1e6:,.1f} MB"
        what |= {
            "gradients": "fp32",
            "optimizer": f"Adam: {adam} bytes a parameter, on {replicas} replicas",
            "activations": f"{kept} (recomputation {layout.recompute}), and work space",
        }
    else:
        what |= {"cache": "keys and values", "activations": "work space of a micro-batch"}
    least, most = (size / 1e9 for size in p.memory.framework_range)
    what["framework"] = f"CUDA, NCCL, fragments: {least:.1f} to {most:.1f}; counted as"
    rows = [(name, text, f"{getattr(p.memory, name) / 1e9:.2f}") for name, text in what.items()]
    return ("memory", "of what", "GB"), rows


def traffic_table(p: Prediction) -> Table:
    """Collectives of one rank in a step, by axis and kind."""
    rows = []
    for *kind, sent, seconds, exposed in p.traffic:
        rate = f"{sent / seconds / 1e9:,.0f}" if seconds else ""
        rows.append((*kind, f"{sent / 1e6:,.3f}", duration(seconds), duration(exposed), rate))
    return ("axis", "collective", "slowest link", "MB sent", "time", "exposed", "GB/s sent"), rows
