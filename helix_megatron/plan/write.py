"""`helix plan --write DIR`: a deployment plan (`deployment`) as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.plan.deployment import deployment
from helix_megatron.plan.explain import (
    Table,
    duration,
    kinds_of_layers,
    memory_table,
    memory_text,
    operators_table,
    speed_text,
    terms_table,
    traffic_table,
)
from helix_megatron.plan.launch_commands import deepspeed_config
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.tables import markdown_table

SHOWN_RANKS = 64  # of the table in Markdown; JSON has all
SHOWN_GROUPS = 4


def write(plan: Plan, layout: Any, directory: Path) -> list[Path]:
    """Write `plan.md` and `plan.json`; their paths.

    Raises:
        HelixError: the directory cannot be made or written.
    """
    prediction = plan.predict(layout)
    content = deployment(plan, prediction)
    paths = [directory / "plan.md", directory / "plan.json"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(markdown(plan, prediction, content))
        paths[1].write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise HelixError(f"cannot write {directory}: {error.strerror}.") from error
    return paths


def markdown(plan: Plan, p: Prediction, content: dict[str, Any]) -> str:
    """The plan to read: `deployment.md.jinja`, filled in."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    page = resources.files("helix_megatron.plan").joinpath("deployment.md.jinja").read_text()
    config, reason = deepspeed_config(plan, p.layout)
    tables = {
        "terms": terms_table(p),
        "cuts": _cuts(content["cuts"]),
        "ranks": _ranks(content["ranks"][:SHOWN_RANKS]),
        "weights": _weights(content["weights_of_a_rank"]),
        "memory": memory_table(plan, p),
        "traffic": traffic_table(p),
        "groups": _groups(content["groups"]),
        "checks": _checks(content["checks"]),
    }
    return environment.from_string(page).render(
        plan=plan,
        model=plan.model,
        cluster=plan.cluster,
        job=plan.job,
        layout=p.layout,
        p=p,
        content=content,
        batch=content["batch"],
        train=plan.job.task == "train",
        duration=duration,
        speed=speed_text(plan, p),
        memory=memory_text(plan, p),
        tables={name: markdown_table(*table) for name, table in tables.items()},
        kinds=[
            (name, count, markdown_table(*operators_table(steps, p.layout.tp)))
            for name, count, steps in kinds_of_layers(plan, p.layout)
        ],
        ranks_left_out=len(content["ranks"]) - SHOWN_RANKS,
        deepspeed=json.dumps(config, indent=2) if config else "",
        no_deepspeed=reason,
        slowest=max(p.traffic, key=lambda t: t.exposed, default=None),
    )


def _cuts(cuts: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for cut in cuts:
        name = f"{cut['m']} × {cut['n']}" + (" **(this plan)**" if cut["chosen"] else "")
        if "reason" in cut:
            rows.append((name, "–", "–", "–", "–", cut["reason"]))
        else:
            time, memory = duration(cut["simulated_seconds"]), f"{cut['memory_bytes'] / 1e9:.1f}"
            rows.append((name, cut["queries"], cut["exchange"], time, memory, ""))
    return ("m × n", "queries", "exchange or cache", "best time", "GB", "why not"), rows


def _ranks(ranks: Sequence[dict[str, Any]]) -> Table:
    rows = [
        (
            f"({r['partition'][0]}, {r['partition'][1]})",
            str(r["rank"]),
            f"{r['node']} : {r['device']}",
            str(r["pipeline_stage"]),
            f"{r['data_parallel_rank']}",
            str(r["context_parallel_rank"]),
            _layers(r["layers"]),
            f"{_span(r['query_heads'])} [{_runs(r['query_dimensions'])}]",
            f"{_span(r['key_value_heads'])} [{_runs(r['key_value_dimensions'])}]",
        )
        for r in ranks
    ]
    heads = ("(group, segment)", "rank", "node : GPU", "stage", "replica", "context part", "layers")
    return (*heads, "query heads [dimensions]", "key-value heads [dimensions]"), rows


def _layers(runs: list[list[int]]) -> str:
    texts = [f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … {texts[-1]}"


def _span(heads: list[int]) -> str:
    return f"{heads[0]}–{heads[-1]}" if len(heads) > 1 else str(heads[0])


def _runs(runs: list[list[int]]) -> str:
    return ", ".join(f"{a}:{b}" for a, b in runs)


def _weights(matrices: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for matrix in matrices:
        (a, b), (c, d), count = matrix["shape"], matrix["of"], matrix["count"]
        copies = f"{count} × " if count > 1 else ""
        rows.append(
            (matrix["name"], f"{copies}[{a}, {b}]", f"[{c}, {d}]", f"{count * a * b / 1e6:,.2f} M")
        )
    return ("matrix", "on this rank", "whole", "parameters"), rows


def _groups(groups: Sequence[dict[str, Any]]) -> Table:
    rows = []
    for group in groups:
        shown = [_members(ranks) for ranks in group["groups"][:SHOWN_GROUPS]]
        more = len(group["groups"]) - len(shown)
        text = "; ".join(shown) + (f"; … {more} more in plan.json" if more else "")
        rows.append((group["axis"], str(group["ranks"]), group["slowest_link"], text))
    return ("group", "ranks", "slowest link", "members"), rows


def _members(ranks: Sequence[int]) -> str:
    step = ranks[1] - ranks[0]
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}–{ranks[-1]}" if step == 1 else f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"


def _checks(checks: Sequence[dict[str, Any]]) -> Table:
    rows = [(c["check"], "passed" if c["passed"] else "**no**", c["figure"]) for c in checks]
    return ("check", "result", "figure"), rows
