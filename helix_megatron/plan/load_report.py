"""`helix plan --task serve`: every layout that a server has, under one load, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from helix_megatron.core.caches import NAMES as CACHES
from helix_megatron.errors import divisors
from helix_megatron.plan.evidence import band
from helix_megatron.plan.launch_commands import not_served, serving_command
from helix_megatron.plan.load import Load, Served, serve
from helix_megatron.plan.results import Plan
from helix_megatron.plan.search import search
from helix_megatron.tables import text_table


def served(plan: Plan, load: Load) -> list[Served]:
    """What every layout that `helix serve` runs does under the load.

    A replica is searched for on every number of GPUs that divides them, with one sequence. Layouts that
    sustain the rate come first, from the shortest time of an answer; then the others, from the highest
    throughput.
    """
    job, ranked = dataclasses.replace(plan.job, global_batch=1), []
    for replicas in divisors(plan.gpus):
        gpus = plan.gpus // replicas
        replica = search(plan.model, gpus, plan.cluster, job, plan.software, plan.limits)
        for row in replica.rows:
            layout = row.layout._replace(dp=replicas)
            if layout.pp * layout.cp * row.layout.dp > 1:
                continue
            if not_served(plan.model, layout):
                continue
            result = serve(plan.scenario, layout, load)
            if result is not None:
                ranked.append(result)
    ranked.sort(key=lambda s: (not s.sustained, answer(s, load) if s.sustained else -s.throughput))
    return ranked


def answer(one: Served, load: Load) -> float:
    """Seconds of a whole answer."""
    return one.first + load.output * one.token


def load_json(plan: Plan, load: Load, found: list[Served]) -> dict[str, Any]:
    """Everything, as data."""
    rows = []
    for one in found:
        layout = one.layout._asdict() | {"description": one.layout.describe()}
        rows.append(one._asdict() | {"layout": layout})
    error = dataclasses.asdict(band(plan.scenario, found[0].layout)) if found else None
    return {
        "simulated": True,
        "model": plan.model.name,
        "cluster": plan.cluster.name,
        "load": {k: v for k, v in load._asdict().items() if v != float("inf")},
        "error_of_published_rows_like_this": error,
        "rows": rows,
    }


def print_load(plan: Plan, load: Load, found: list[Served], count: int) -> None:
    """The table, what it is worth, and the command of the first row."""
    saturated = load.rate == float("inf")
    rate = "as many requests as it can serve" if saturated else f"{load.rate:g} requests a second"
    print(
        f"{plan.model.name} on {plan.gpus} × {plan.cluster.chip.name}, {plan.cluster.name}: {rate}, prompts of "
        f"{load.prompt} tokens, answers of {load.output}, {plan.software.precision}. All figures are simulated."
    )
    if not found:
        print("Nothing fits: not one sequence of this length beside the weights. Try more GPUs.")
        return
    head = (
        "#",
        "layout",
        "cache",
        "at once",
        "fit",
        "tokens/s",
        "ms to first",
        "ms per token",
        "keeps up",
    )
    rows = [
        (
            str(number),
            one.layout.describe(),
            one.layout.cache if one.layout.cache in CACHES else "whole heads",
            f"{one.sequences:.0f}",
            str(one.fitting),
            f"{one.throughput:,.0f}",
            f"{one.first * 1e3:,.0f}",
            f"{one.token * 1e3:.2f}",
            "–" if saturated else "yes" if one.sustained else "no",
        )
        for number, one in enumerate(found[:count], start=1)
    ]
    print("Layouts by the time of an answer; those that cannot keep up come last:")
    print(text_table(head, rows, left=3))
    print("at once, fit: sequences of one replica; tokens/s: of answers, all GPUs.")
    print(
        f"Time per token: {band(plan.scenario, found[0].layout).text()}. Time to first: not validated."
    )
    print(verdict_text(plan, load, found))
    layout = found[0].layout
    batch = max(1, round(found[0].sequences)) * layout.dp
    job = dataclasses.replace(plan.job, global_batch=batch)
    print("\n" + serving_command(dataclasses.replace(plan, job=job), layout))


def verdict_text(plan: Plan, load: Load, found: list[Served]) -> str:
    """Whether cutting heads helps under this load, or no verdict."""
    best = {
        cut: next((s for s in found if (s.layout.segments > 1) == cut), None)
        for cut in (True, False)
    }
    helix, stock = best[True], best[False]
    if helix is None or stock is None:
        which = "with whole heads" if helix is None else "that cut heads"
        return f"Only layouts {which} are left."
    cut, whole = helix.layout.describe(), stock.layout.describe()
    if helix.sustained != stock.sustained:
        keeps, other = (cut, whole) if helix.sustained else (whole, cut)
        helps = "helps" if helix.sustained else "does not help here"
        return f"Helix {helps}: {keeps} keeps up, and {other} does not."
    if helix.sustained:
        ratio, what = answer(stock, load) / answer(helix, load) - 1, "answers"
    else:
        ratio, what = helix.throughput / stock.throughput - 1, "serves"
    margin = max(band(plan.scenario, one.layout).apart for one in (helix, stock))
    if abs(ratio) <= margin:
        return (
            f"No verdict: {cut} and {whole} are {100 * abs(ratio):.1f} % apart, and comparisons like these err "
            f"by {100 * margin:.0f} %."
        )
    if ratio > 0:
        return f"Helix helps: {cut} {what} {100 * ratio:.0f} % faster (simulated) than {whole}."
    return f"Helix does not help here: {whole} {what} faster (simulated) than {cut} by {-100 * ratio:.0f} %."
