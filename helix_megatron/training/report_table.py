"""The table of a report: rows of cells, one column per run, for the terminal, the page and `report.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from helix_megatron import units
from helix_megatron.tables import text_table
from helix_megatron.training.report_runs import Comparison, Difference, Run

NOTHING = "–"
# Heading, metric, what it is over the iterations of a run, format.
MEASURED: tuple[tuple[str, str, Callable[[Run, str], float | None], Any], ...] = (
    ("tokens/s", "tokens_per_second", Run.typical, units.count),
    ("communication, ms/token", "comm_ms_per_token", Run.typical, ".3g"),
    ("sent in attention, bytes/token", "attention_bytes_per_token", Run.typical, ",.0f"),
    ("sent elsewhere, bytes/token", "other_bytes_per_token", Run.typical, ",.0f"),
    ("memory of a rank", "memory_bytes", Run.largest, units.size),
)


def table_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Heading and one cell per run, top to bottom."""
    runs = comparison.runs
    rows = [
        ("ranks", [str(run.description["ranks"]) for run in runs]),
        ("layout", [layout_text(run.description["layout"]) for run in runs]),
        ("attention", [attention_text(run.description["layout"]) for run in runs]),
        ("iterations", [str(len(run.records)) for run in runs]),
    ]
    for iteration in comparison.milestones:
        losses = [_text(run.losses.get(iteration), ".4f") for run in runs]
        rows.append((f"loss at iteration {iteration}", losses))
    if len({max(run.records) for run in runs}) > 1:
        rows.append(("last loss", [f"{list(run.losses.values())[-1]:.4f}" for run in runs]))
    validation = [_text(run.last("validation_loss"), ".4f") for run in runs]
    if set(validation) != {NOTHING}:
        rows.append(("last validation loss", validation))
    return [
        *rows,
        ("largest |loss difference|", [_difference_text(comparison, run) for run in runs]),
        *(
            (heading, [_text(value_of(run, metric), form) for run in runs])
            for heading, metric, value_of, form in MEASURED
        ),
    ]


def settings_rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Every setting in the runs' descriptions and one cell per run; label and command stand elsewhere."""
    settings = [_flat(run.description) for run in comparison.runs]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    # What only a later run has joins its group, such as `layout.`, instead of standing at the end.
    groups = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return [
        (name, [of_run.get(name, NOTHING) for of_run in settings])
        for name in sorted(names, key=lambda name: groups.index(name.partition(".")[0]))
        if name not in ("label", "command")
    ]


def table_text(comparison: Comparison) -> str:
    """The table for a terminal: headings on the left, numbers on the right of their column."""
    labels = ["", *(run.label for run in comparison.runs)]
    rows = [[heading, *cells] for heading, cells in table_rows(comparison)]
    head, *lines = text_table(labels, rows, indent="").splitlines()
    return "\n".join([head, "─" * len(head), *lines])


def table_numbers(comparison: Comparison) -> list[dict[str, Any]]:
    """The table's numbers, unrounded, one object per run, for `report.json`."""
    return [
        {
            "label": run.label,
            "directory": str(run.directory),
            "ranks": run.description["ranks"],
            "layout": run.description["layout"],
            "iterations": len(run.records),
            "losses": {str(i): run.losses.get(i) for i in comparison.milestones},
            "last_validation_loss": run.last("validation_loss"),
            "loss_difference": _difference_numbers(comparison.differences.get(run.label)),
        }
        | {metric: value_of(run, metric) for _, metric, value_of, _ in MEASURED}
        for run in comparison.runs
    ]


def layout_text(layout: Mapping[str, Any]) -> str:
    """`TP 4 (m 2, n 2), EP 4`: the segments m and head groups n of TP, and other degrees above 1."""
    degrees = [f"{name.upper()} {layout.get(name, 1)}" for name in ("tp", "pp", "cp", "dp", "ep")]
    shown = [degree for degree in degrees[1:] if not degree.endswith(" 1")]
    m, n = layout.get("m", 1), layout.get("n", layout.get("tp", 1))
    partition = f" (m {m}, n {n})" if m != 1 else ""
    return ", ".join([degrees[0] + partition, *shown])


def attention_text(layout: Mapping[str, Any]) -> str:
    """`stock` where heads are not cut, else the attention and its exchange."""
    if layout.get("m", 1) == 1:
        return "stock"
    return ", ".join(str(layout[key]) for key in ("attention", "exchange") if layout.get(key))


def difference_sentence(label: str, difference: Difference) -> str:
    """What the comparison of one run found, as a sentence."""
    pair = f"“{label}” and “{difference.reference}” train the same model"
    if difference.largest is None:
        return f"{pair}, but share no iteration."
    if math.isinf(difference.largest):
        return f"{pair}; at iteration {difference.iteration} a loss is not finite."
    shared = len(difference.by_iteration)
    return (
        f"{pair}: over {shared} iteration{'s' if shared > 1 else ''} their losses differ by at most "
        f"{difference.largest:.2g} nats per token (iteration {difference.iteration})."
    )


def _difference_text(comparison: Comparison, run: Run) -> str:
    if run.label not in comparison.differences:
        return "baseline" if comparison.is_reference(run) else NOTHING
    difference = comparison.differences[run.label]
    if difference.largest is None:
        return "no iteration shared"
    if math.isinf(difference.largest):
        return f"not finite at {difference.iteration}"
    return f"{difference.largest:.2g}"


def _difference_numbers(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "reference": difference.reference,
        "shared_iterations": len(difference.by_iteration),
        "largest": difference.largest,
        "at_iteration": difference.iteration,
        "finite": difference.largest is not None and math.isfinite(difference.largest),
    }


def _text(value: float | None, form: Any) -> str:
    """A number in a format or through a function; a dash when there is none."""
    if value is None:
        return NOTHING
    return form(value) if callable(form) else format(value, form)


def _flat(description: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as text, nested ones under dotted names."""
    flat: dict[str, str] = {}
    for key, value in description.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(value)
    return flat
