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
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.results import Plan
from helix_megatron.plan.score import Prediction
from helix_megatron.tables import markdown_table

SHOWN_RANKS = 64  # of the table in Markdown; JSON has all
SHOWN_GROUPS = 4


def write(plan: Plan, layout: Layout, directory: Path) -> list[Path]:
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
    environment.globals = {f.__name__: f for f in (duration, layers, members, runs, span)}
    page = resources.files("helix_megatron.plan").joinpath("deployment.md.jinja").read_text()
    config, reason = deepspeed_config(plan, p.layout)
    tables = {"terms": terms_table(p), "memory": memory_table(plan, p), "traffic": traffic_table(p)}
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
        speed=speed_text(plan, p),
        memory=memory_text(plan, p),
        tables={name: markdown_table(*table) for name, table in tables.items()},
        kinds=[
            (name, count, markdown_table(*operators_table(steps, p.layout.tp)))
            for name, count, steps in kinds_of_layers(plan, p.layout)
        ],
        shown_ranks=SHOWN_RANKS,
        deepspeed=json.dumps(config, indent=2) if config else "",
        no_deepspeed=reason,
        slowest=max(p.traffic, key=lambda t: t.exposed, default=None),
    )


# ------------------------------------------------------------------------------ cells


def layers(runs: list[list[int]]) -> str:
    texts = [f"{a}–{b - 1}" if b > a + 1 else str(a) for a, b in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{', '.join(texts[:3])}, … {texts[-1]}"


def span(heads: list[int]) -> str:
    return f"{heads[0]}–{heads[-1]}" if len(heads) > 1 else str(heads[0])


def runs(runs: list[list[int]]) -> str:
    return ", ".join(f"{a}:{b}" for a, b in runs)


def members(groups: Sequence[Sequence[int]]) -> str:
    """The first groups, short."""
    texts = []
    for ranks in groups[:SHOWN_GROUPS]:
        first, second, *_, last = *ranks, ranks[-1]
        if len(ranks) <= 4:
            texts.append(", ".join(map(str, ranks)))
        else:
            texts.append(
                f"{first}–{last}" if second == first + 1 else f"{first}, {second}, … {last}"
            )
    more = len(groups) - len(texts)
    return "; ".join(texts) + (f"; … {more} more in plan.json" if more else "")
