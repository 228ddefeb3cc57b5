"""The plan as a table for the terminal and as JSON. Everything in it is simulated, and says so."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

from helix_megatron.core.caches import NAMES as CACHES
from helix_megatron.errors import listed
from helix_megatron.plan.evidence import band
from helix_megatron.plan.explain import attention_times
from helix_megatron.plan.launch_commands import caveats, command_words, deepspeed_config
from helix_megatron.plan.results import Plan, Row
from helix_megatron.plan.score import Prediction
from helix_megatron.plan.verdict import missing_rival, rivals, verdict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STEP = {"train": "s per step", "prefill": "s to first token", "decode": "ms per token"}
EXAMPLES = 4


def shown_rows(plan: Plan, count: int) -> list[tuple[int | None, Row]]:
    """(number, row) of the table: the fastest, and the best of every rival family; rivals that were not asked
    for have no number."""
    numbers = {id(row): number for number, row in enumerate(plan.rows, start=1)}
    wanted = {id(row): row for row in [*plan.rows[:count], *rivals(plan).values()]}
    rows = sorted(wanted.values(), key=lambda row: (row.seconds, row.memory))
    return [(numbers.get(id(row)), row) for row in rows]


def print_plan(
    plan: Plan, console: Console, *, count: int = 10, all_rejected: bool = False
) -> None:
    """Header, table, what was rejected, and the verdict."""
    console.print(header(plan), highlight=False)
    if plan.everything:
        console.print(ranking_table(plan, count))
    print_rejected(plan, console, everything=all_rejected)
    helps, text = verdict(plan)
    console.print()
    if plan.rows:
        console.print(f"Row 1: {band(plan.scenario, plan.rows[0].layout).text()}.", highlight=False)
    if missing_rival(plan):
        console.print(missing_rival(plan), highlight=False)
    console.print(text, style="bold green" if helps else "bold", highlight=False)


def header(plan: Plan) -> str:
    """Model, cluster and job, and how many layouts are ranked and are not."""
    model, job, cluster = plan.model, plan.job, plan.cluster
    kind = f"{model.experts} experts, {model.moe_router_topk} a token, " if model.experts else ""
    return (
        f"{model.name}: {model.parameters / 1e9:.1f} B parameters, {kind}{model.num_layers} layers, hidden "
        f"{model.hidden_size}, {model.num_attention_heads} query and {model.num_query_groups} key-value heads "
        f"of {model.head_dim}\n"
        f"{plan.gpus} × {cluster.chip.name}, {cluster.name}: {cluster.domain} a domain of "
        f"{cluster.domain_link}, {cluster.network_link} between. {job.task}, sequence {job.sequence}, batch "
        f"{job.global_batch}, {plan.software.precision}. All figures are simulated.\n"
        f"{len(plan.rows)} layouts fit and are ranked. Left out, layouts or what several have in common: "
        f"{listed(f'{kind} {number}' for kind, number in left_out(plan)) or 'nothing'}."
    )


def left_out(plan: Plan) -> list[tuple[str, int]]:
    """(kind, how many) of what is not ranked, the most frequent first."""
    return Counter(rejected.kind for rejected in plan.rejected).most_common()


def ranking_table(plan: Plan, count: int) -> Table:
    """The fastest layouts and their rivals."""
    from rich.table import Table

    best = rivals(plan).items()
    table = Table(title=f"Layouts of {plan.model.name} by {STEP[plan.job.task]} (simulated)")
    table.add_column("#", justify="right")
    table.add_column("layout", overflow="fold", min_width=18)
    table.add_column("queries, exchange", overflow="fold")
    for title in ("batch", "recompute"):
        table.add_column(title)
    for title in (STEP[plan.job.task], "tokens/s", "MFU", "GB", "exposed", "hidden", "bubble"):
        table.add_column(title, justify="right")
    table.add_column("best of", overflow="fold")
    for number, row in shown_rows(plan, count):
        names = ", ".join(name for name, rival in best if rival is row)
        table.add_row(*_cells(plan, number, plan.predict(row.layout)), names)
    return table


def _cells(plan: Plan, number: int | None, p: Prediction) -> list[str]:
    layout, decode = p.layout, plan.job.task == "decode"
    exchange = f"cache {layout.cache}" if decode else f"{layout.query_layout}, {layout.exchange}"
    without = layout.tp > 1 and not layout.sequence_parallel and not decode
    peak = plan.cluster.chip.flops[plan.software.unquantised]
    shares = (p.exposed / p.seconds, p.hidden / p.seconds, p.bubble)
    return [
        "–" if number is None else str(number),
        layout.describe() + (" · no SP" if without else ""),
        exchange if layout.segments > 1 or (decode and layout.cache in CACHES) else "whole heads",
        f"{layout.micro_batch} × {p.micro_batches}",
        layout.recompute,
        f"{p.seconds * 1e3:.2f}" if decode else f"{p.seconds:.3f}",
        f"{p.tokens_per_second:,.0f}",
        f"{p.flops_per_gpu / peak:.0%}",
        f"{p.memory.total / 1e9:.1f}",
        *(f"{share:.0%}" for share in shares),
    ]


def print_rejected(plan: Plan, console: Console, *, everything: bool = False) -> None:
    """Why the others are not ranked: all of them, or a few of each kind."""
    for kind, number in left_out(plan):
        of_kind = [rejected for rejected in plan.rejected if rejected.kind == kind]
        shown = of_kind if everything else of_kind[:EXAMPLES]
        console.print(f"\nrejected, {kind}: {number}", style="bold", highlight=False)
        for rejected in shown:
            console.print(f"  {rejected.what}: {rejected.reason}", highlight=False)
        if len(shown) < number:
            more = f"  … and {number - len(shown)} more (--rejected shows all)"
            console.print(more, highlight=False)


# -------------------------------------------------------------------------------- JSON


def prediction_json(plan: Plan, p: Prediction) -> dict[str, Any]:
    """One layout."""
    memory = {name: getattr(p.memory, name) for name in p.memory.__dataclass_fields__}
    core, exchange = attention_times(plan, p.layout)
    return {
        "simulated": True,
        "layout": p.layout._asdict() | {"head_groups": p.layout.head_groups},
        "description": p.layout.describe(),
        "simulated_seconds": p.seconds,
        "simulated_tokens_per_second": p.tokens_per_second,
        "model_flops_per_second_per_gpu": p.flops_per_gpu,
        "error_of_published_rows_like_this": dataclasses.asdict(band(plan.scenario, p.layout)),
        "micro_batches": p.micro_batches,
        "bubble": p.bubble,
        "attention_seconds_per_layer": {"core": core, "exchange": exchange},
        "seconds_of": p.terms,
        "memory_bytes": memory | {"total": p.memory.total},
        "communication": [traffic._asdict() for traffic in p.traffic],
        "exposed_communication_seconds": p.exposed,
        "hidden_communication_seconds": p.hidden,
        "megatron_flags": command_words(plan, p.layout),
        "deepspeed": deepspeed_config(plan, p.layout)[0],
        "caveats": caveats(plan, p.layout),
    }


def plan_json(plan: Plan, count: int) -> dict[str, Any]:
    """The plan: rows that the table shows in full, all rows in short, all that was rejected."""

    def full(row: Row) -> dict[str, Any]:
        return prediction_json(plan, plan.predict(row.layout))

    helps, text = verdict(plan)
    facts = ("name", "parameters", "active_parameters", "source")
    model = {fact: getattr(plan.model, fact) for fact in facts}
    return {
        "simulated": True,
        "model": model,
        "cluster": {"name": plan.cluster.name, "source": plan.cluster.source, "gpus": plan.gpus},
        "job": plan.job.__dict__,
        "software": plan.software.__dict__,
        "helix_helps": helps,
        "verdict": text,
        "rival_not_ranked": missing_rival(plan),
        "rivals": {name: full(row) for name, row in rivals(plan).items()},
        "shown": {str(n): full(row) for n, row in enumerate(plan.rows[:count], start=1)},
        "rows": [
            {
                "layout": row.layout._asdict(),
                "simulated_seconds": row.seconds,
                "memory_bytes": row.memory,
            }
            for row in plan.rows
        ],
        "rejected": [{"what": r.what, "kind": r.kind, "reason": r.reason} for r in plan.rejected],
    }
