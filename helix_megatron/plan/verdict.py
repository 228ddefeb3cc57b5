"""Whether cutting heads helps here, said plainly."""

from __future__ import annotations

import math
from collections.abc import Callable

from helix_megatron.errors import divisors, listed
from helix_megatron.hardware import FRAMEWORK_BYTES
from helix_megatron.plan.evidence import band
from helix_megatron.plan.inference_memory import average_cache_bytes
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.memory import training_states
from helix_megatron.plan.results import Plan, Row
from helix_megatron.plan.stages import dealings

RIVALS: dict[str, Callable[[Layout], bool]] = {
    "Helix (m > 1)": lambda layout: layout.segments > 1,
    "m = 1": lambda layout: layout.segments == 1,
    "TP × PP": lambda layout: layout.segments == 1 and layout.pp > 1 and layout.cp == 1,
    "context parallel": lambda layout: layout.segments == 1 and layout.cp > 1,
}


def rivals(plan: Plan) -> dict[str, Row]:
    """The best row of each family; and TP = n with context parallel m for the best Helix row's m and n."""
    found = {}
    for name, wanted in RIVALS.items():
        row = plan.best(wanted)
        if row is not None:
            found[name] = row
    helix = found.get("Helix (m > 1)")
    if helix is not None:
        name, same = _same_groups(plan, helix.layout)
        if same is not None:
            found[name] = same
    return found


def _same_groups(plan: Plan, helix: Layout) -> tuple[str, Row | None]:
    """TP = n with context parallel m, for a layout's m and n: its name, and the best row."""
    n, m = helix.head_groups, helix.segments
    best = plan.best(lambda x: x.segments == 1 and x.tp == n and x.cp == m)
    return f"TP {n} × CP {m}", best


def verdict(plan: Plan) -> tuple[bool, str]:
    """(whether Helix helps, a few sentences)."""
    if not plan.everything:
        return False, nothing_fits(plan)
    helix = plan.best(RIVALS["Helix (m > 1)"])
    stock = plan.best(RIVALS["m = 1"])
    cut, whole = (row.layout.describe() if row else "none" for row in (helix, stock))
    if helix is None:
        text = f"Helix does not help here: no layout that cuts heads fits. Best: {whole}."
        if plan.model.special.latent and plan.job.task == "decode":
            text = (
                "Its latents have no key-value heads to cut, and helix serve keeps them once on all ranks. "
                f"Plain tensor parallelism, with a copy on each, is not ranked here. Best: {whole}."
            )
        elif plan.model.special.latent:
            text = f"Helix does not help here: latent attention has no key-value heads to cut. Best: {whole}."
        return False, text
    if stock is None:
        return True, f"Helix helps: nothing runs here without cutting heads. Best: {cut}."
    gain = stock.seconds / helix.seconds - 1
    margin = max(band(plan.scenario, row.layout).apart for row in (helix, stock))
    if gain > margin:
        return True, (
            f"Helix helps: {cut} is {100 * gain:.1f} % faster (simulated) than the best layout with whole "
            f"heads, {whole}.{_why(plan, helix, stock)}"
        )
    if gain > -margin:
        return False, (
            f"No verdict: the best layout that cuts heads, {cut}, and the best with whole heads, {whole}, are "
            f"{100 * abs(gain):.1f} % apart, and the planner's comparisons of published runs like these err by "
            f"{100 * margin:.0f} %. Try both, or take the one with whole heads."
        )
    slower = 100 * (helix.seconds / stock.seconds - 1)
    return False, (
        f"Helix does not help here: {whole} with whole heads is {slower:.1f} % faster (simulated) than the "
        f"best layout that cuts heads, {cut}.{_why_not(plan, stock)}"
    )


def _why(plan: Plan, helix: Row, stock: Row) -> str:
    heads, whole, cut = plan.model.num_query_groups, stock.layout, helix.layout
    if whole.tp > heads:
        return (
            f" With TP {whole.tp} above the {heads} key-value heads, stock Megatron gathers the whole QKV "
            "projection in every layer."
        )
    if whole.recompute != cut.recompute:
        return f" It fits with less recomputation ({cut.recompute}, not {whole.recompute})."
    return " It needs fewer pipeline stages, hence a smaller bubble." if whole.pp > cut.pp else ""


def _why_not(plan: Plan, stock: Row) -> str:
    tp, heads = stock.layout.tp, plan.model.num_query_groups
    why = f" Its TP {tp} does not exceed the {heads} key-value heads, so every rank has whole ones"
    return f"{why} and attention exchanges nothing." if tp <= heads else ""


def missing_rival(plan: Plan) -> str:
    """Why TP = n with context parallel m, for m and n of the best Helix row, is not ranked; empty if it is."""
    helix = plan.best(RIVALS["Helix (m > 1)"])
    if helix is None:
        return ""
    name, row = _same_groups(plan, helix.layout)
    if row is not None:
        return ""
    wanted = Layout(tp=helix.layout.head_groups, cp=helix.layout.segments)
    for rejected in plan.rejected:
        if rejected.explains(wanted, "tp", "segments", "cp"):
            return f"{name} is not ranked: {rejected.what} {rejected.reason}."
    return f"{name} is not ranked: its micro-batches do not divide the global batch."


def recommended(plan: Plan) -> int:
    """The number of the row that the verdict speaks for: the first that cuts heads if Helix helps, else the
    first that does not; 1 where the flags leave only the others."""
    helps = verdict(plan)[0]
    numbered = enumerate(plan.rows, start=1)
    return next((n for n, row in numbered if (row.layout.segments > 1) == helps), 1)


def nothing_fits(plan: Plan) -> str:
    """What came nearest, and what to try."""
    text = f"Nothing fits {plan.model.name} on {plan.gpus} GPUs of {plan.cluster.name}."
    tight = [r for r in plan.rejected if r.kind == "does not fit"]
    if tight:
        nearest = min(tight, key=lambda r: r.needed)
        text += f" Nearest: {nearest.what} {nearest.reason}."
    else:
        reasons = "; ".join(f"{r.what}: {r.reason}" for r in plan.rejected[:2])
        power = 1 << (plan.gpus.bit_length() - 1)
        other = power if power < plan.gpus else 2 * power
        return (
            f"{text} No split of {plan.gpus} GPUs divides model and batch ({reasons}; …). Try --gpus {other} "
            f"or --global-batch {-(-plan.job.global_batch // plan.gpus) * plan.gpus}."
        )
    if plan.job.task != "train":
        return f"{text} {_smaller_batch(plan)}"
    count = enough_gpus(plan)
    if count is not None:
        stages = listed(_stage_counts(plan.model.num_layers))
        layers = f"Its {plan.model.num_layers} layers can be dealt to {stages} stages"
        return f"{text} {layers}: try --gpus {count}."
    return f"{text} Try more GPUs, another --global-batch or a shorter --sequence-length."


def _smaller_batch(plan: Plan) -> str:
    """The largest part of the batch whose cache leaves a tenth of the memory, over all GPUs."""
    model, job = plan.model, plan.job
    each = average_cache_bytes(model, Layout(), 1, job.sequence, plan.software.element)
    cache = each * model.num_layers
    room = plan.gpus * (0.9 * plan.cluster.chip.memory - FRAMEWORK_BYTES)
    room -= model.parameters * plan.software.weight_bytes
    fitting = [size for size in divisors(job.global_batch) if size * cache <= room]
    text = f"The key-value cache of a sequence is {cache / 1e9:.2f} GB, {job.global_batch} of them "
    text += f"{job.global_batch * cache / 1e9:,.0f} GB: try "
    if fitting and fitting[-1] < job.global_batch:
        return f"{text}--global-batch {fitting[-1]}, or more GPUs."
    return f"{text}more GPUs, or a shorter --sequence-length."


def _stage_counts(layers: int) -> list[int]:
    """Numbers of pipeline stages that the layers can be dealt to: those that divide them, and powers of two."""
    powers = [1 << power for power in range(layers.bit_length())]
    return [stages for stages in sorted({*divisors(layers), *powers}) if dealings(layers, stages)]


def enough_gpus(plan: Plan) -> int | None:
    """The next number of GPUs on which weights and states would leave a fifth of the memory for the rest."""
    model, cluster, domain = plan.model, plan.cluster, plan.cluster.domain
    start = plan.gpus // domain * domain + domain
    for count in range(start, 64 * max(domain, plan.gpus), domain):
        for pp in _stage_counts(model.num_layers):
            first, last = dealings(model.num_layers, pp)[0]
            for tp in (
                t for t in (1, 2, 4, 8) if t <= domain and model.num_attention_heads % t == 0
            ):
                if count % (tp * pp) or plan.job.global_batch % (count // (tp * pp)):
                    continue
                experts = math.gcd(model.experts or 1, count // pp)
                layout = Layout(tp, pp, count // (tp * pp), ep=experts, first=first, last=last)
                states = training_states(model, layout, plan.software)
                if states.total < 0.8 * cluster.chip.memory:
                    return count
    return None
