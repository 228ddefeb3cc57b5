"""How far the planner was off where others measured: the nearest published rows, none of them fitted.

`evidence.json` is written by `scripts/validate_planner.py`: a row for each published run, with the
error of its prediction. A figure of a layout is as good as that of the rows like it; a comparison of two
layouts is as good as the planner's comparisons of two rows of one model, which share most of what is wrong
with them.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.settings import Scenario

NEAREST = 12  # rows that a band is the mean of
LEAST = 0.03  # no band is narrower: neighbours of one table are often the same layout
# What a difference in kind counts beside a factor of two in size.
KINDS = {"chip": 2.0, "precision": 1.0, "experts": 4.0}


@dataclass(frozen=True)
class Band:
    """error: mean of the absolute relative errors of the rows. apart: of the ratios between two of one model.
    task: train or decode. tables: where the rows are from. alike: rows of the same kind of chip, precision and
    model."""

    error: float
    apart: float
    task: str
    tables: tuple[str, ...]
    alike: int

    def text(self) -> str:
        """`±6 % (12 published training runs like this, of simumax_b200)`."""
        like = (
            "like this" if self.alike == NEAREST else f"that come nearest, {self.alike} like this"
        )
        what = "training runs" if self.task == "train" else "servers"
        return f"±{100 * self.error:.0f} % ({NEAREST} published {what} {like}, of {', '.join(self.tables)})"


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """All of `evidence.json`."""
    return tuple(json.loads(Path(__file__).with_name("evidence.json").read_text(encoding="utf-8")))


def band(scenario: Scenario, layout: Layout) -> Band:
    """What the prediction of a layout is worth. Prompts are judged by training, which computes the same."""
    task = "decode" if scenario.job.task == "decode" else "train"
    own = {
        "chip": scenario.cluster.chip.family,
        "precision": scenario.software.precision,
        "experts": bool(scenario.model.experts),
    }
    return _band(
        task, tuple(own.items()), layout.gpus // (layout.dp if task == "decode" else 1), layout.tp
    )


@functools.lru_cache(maxsize=1024)
def _band(task: str, own: tuple[tuple[str, Any], ...], gpus: int, tp: int) -> Band:
    def distance(row: dict[str, Any]) -> float:
        kinds = sum(KINDS[key] for key, value in own if row[key] != value)
        return kinds + abs(math.log2(row["gpus"] / gpus)) / 2 + abs(math.log2(row["tp"] / tp))

    found = sorted((row for row in rows() if row["task"] == task), key=distance)[:NEAREST]
    tables = tuple(dict.fromkeys(row["table"] for row in found))
    alike = sum(all(row[key] == value for key, value in own) for row in found)
    error = statistics.mean(abs(row["error"]) for row in found)
    return Band(max(LEAST, error), max(LEAST, _apart(found, error)), task, tables, alike)


def _apart(found: Sequence[dict[str, Any]], error: float) -> float:
    """Mean error of the ratio of two rows' times, over all pairs of one model in one table."""
    ratios = []
    for one, other in itertools.combinations(found, 2):
        if (one["table"], one["label"]) == (other["table"], other["label"]):
            ratios.append(abs((1 + one["error"]) / (1 + other["error"]) - 1))
    return statistics.mean(ratios) if ratios else error
