"""What the planner says of tables that it has never seen: each left out of the fit; errors, and order of pairs.

The one number that is fitted to training runs is the share of its peak that a chip sustains, to dense models.
A table to which it was not fitted is predicted as `helix plan` does. For the one to which it was, it is fitted
again: to other tables of that chip and precision; where there are none, to its own other models, each of them
left out in turn; and where these are too few, to other tables of the same generation of chips. Decode has no
fitted number.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.hardware import CHIPS
from published_tables import FOLDER, Group, Point

# Chip and precision → the table to which `Chip.sustained` was fitted; those of other tables were not.
FITTED_ON = {
    ("a100", "bf16"): "training_a100",
    ("h100", "bf16"): "dgx_cloud",
    ("h100", "fp8"): "dgx_cloud",
    ("b200", "bf16"): "simumax_b200",
    ("gb200", "bf16"): "simumax_b200",
    ("b200", "fp8"): "megatron_bridge",
    ("gb200", "fp8"): "megatron_bridge",
}
OWN = "the planner's own share, fitted to no row of this table"
DENSE = "the planner's own share, fitted to the dense rows of this table"
MODELS = 3  # of a table, at least, for one of them to be predicted from the others
GROWN = 0.5  # percentage points by which an error may differ from the accepted one
APART = 0.05  # pairs that differ by less are not counted


@dataclass(frozen=True)
class Result:
    """A group with the seconds that were predicted for it, and where the sustained share came from."""

    group: Group
    predicted: tuple[float, ...]
    fitted_on: str

    @property
    def errors(self) -> list[float]:
        """Relative, signed."""
        pairs = zip(self.predicted, self.group.points, strict=True)
        return [seconds / point.measured - 1 for seconds, point in pairs]

    @property
    def mean(self) -> float:
        """Mean absolute error in per cent."""
        return 100 * statistics.mean(map(abs, self.errors))

    @property
    def worst(self) -> tuple[float, str]:
        """The error furthest from zero, in per cent, and its row."""
        error, point = max(
            zip(self.errors, self.group.points, strict=True), key=lambda pair: abs(pair[0])
        )
        return 100 * error, f"{point.label}, {point.layout.describe()}"

    @property
    def guess(self) -> float:
        """The same mean for the best single rate of these very rows."""
        points = self.group.points
        rates = [point.work / point.measured for point in points]

        def error(rate: float) -> float:
            return statistics.mean(abs(p.work / rate / p.measured - 1) for p in points)

        return 100 * min(map(error, rates))

    @property
    def memory(self) -> float | None:
        """Mean absolute error of memory in per cent, without what CUDA and NCCL take; None without rows."""
        from helix_megatron.plan.memory import training_memory

        errors = []
        for point in self.group.points:
            run = point.run
            if run is not None and run.memory:
                found = training_memory(run.model, run.layout, run.job, run.software)
                errors.append(abs((found.total - found.framework) / run.memory - 1))
        return 100 * statistics.mean(errors) if errors else None

    @property
    def pairs(self) -> tuple[int, int]:
        """(pairs of rows of one model whose speed per work is more than 5 % apart, those ranked right)."""
        by_label: dict[str, list[tuple[float, float]]] = {}
        for seconds, point in zip(self.predicted, self.group.points, strict=True):
            rates = point.work / point.measured, point.work / seconds
            by_label.setdefault(point.label, []).append(rates)
        found = right = 0
        for rates_of_label in by_label.values():
            for (a, x), (b, y) in itertools.combinations(rates_of_label, 2):
                if abs(a / b - 1) > APART:
                    found += 1
                    right += (a > b) == (x > y)
        return found, right


def fit(points: Sequence[Point]) -> float:
    """The sustained share with which the median error is zero, by bisection."""
    low, high = 0.1, 1.0
    while high - low > 0.002:
        middle = (low + high) / 2
        error = statistics.median(p.predict(middle) / p.measured - 1 for p in points)
        low, high = (middle, high) if error > 0 else (low, middle)
    return (low + high) / 2


def results_of(groups: Sequence[Group]) -> list[Result]:
    """Every group, predicted by tables of this repository, which everybody has, other than its own."""
    own = [group for group in groups if (FOLDER / f"{group.table}.csv").exists()]
    return [_result(group, [g for g in own if g.table != group.table]) for group in groups]


def _result(group: Group, others: Sequence[Group]) -> Result:
    fitted = FITTED_ON.get((group.chip, group.precision)) == group.table
    if group.kind != "dense" or not fitted:
        source = DENSE if fitted and group.kind == "MoE" else OWN
        return Result(group, tuple(point.predict(None) for point in group.points), source)
    dense = [g for g in others if g.kind == "dense"]
    labels = {_model(point) for point in group.points}
    same = [g for g in dense if (g.chip, g.precision) == (group.chip, group.precision)]
    if not same and len(labels) < MODELS:
        same = [g for g in dense if CHIPS[g.chip].family == CHIPS[group.chip].family]
    if same:
        share = fit([point for g in same for point in g.points])
        predicted = tuple(point.predict(share) for point in group.points)
        return Result(group, predicted, f"{share:.2f} from {'; '.join(g.name for g in same)}")
    shares = {x: fit([p for p in group.points if _model(p) != x]) for x in labels}
    predicted = tuple(point.predict(shares[_model(point)]) for point in group.points)
    return Result(group, predicted, "each model left out in turn: no other table of this kind")


def _model(point: Point) -> str:
    """What a point is left out with: a model with fewer layers is no other one."""
    return point.label.removesuffix("-Proxy")


# ---------------------------------------------------------------------------- accepted


def figures(results: Iterable[Result]) -> dict[str, dict[str, float]]:
    """What is compared with the accepted version, by the name of the group."""
    found = {}
    for result in results:
        own = {"rows": float(len(result.group.points)), "error": round(result.mean, 2)}
        if result.memory is not None:
            own["memory_error"] = round(result.memory, 2)
        found[result.group.name] = own
    return found


def grown(now: dict[str, dict[str, float]], accepted: dict[str, dict[str, float]]) -> list[str]:
    """A sentence for each figure that is worse than the accepted one by more than half a point."""
    return [
        f"{name}: the {key.replace('_', ' ')} is {value} %, and {accepted[name][key]} % was accepted."
        for name, own in now.items()
        for key, value in own.items()
        if key != "rows" and value > accepted.get(name, {}).get(key, float("inf")) + GROWN
    ]


def rows_of(results: Iterable[Result]) -> list[dict[str, Any]]:
    """What `helix plan` compares a layout with: `helix_megatron/plan/evidence.json`."""
    rows = []
    for result in results:
        for error, point in zip(result.errors, result.group.points, strict=True):
            layout = point.layout
            rows.append(
                {
                    "task": "decode" if result.group.kind == "decode" else "train",
                    "table": result.group.table,
                    "chip": CHIPS[result.group.chip].family,
                    "precision": result.group.precision,
                    "experts": result.group.kind == "MoE",
                    "gpus": layout.gpus,
                    "tp": layout.tp,
                    "label": point.label,
                    "error": round(error, 3),
                }
            )
    return rows


def rows_text(rows: Sequence[dict[str, Any]]) -> str:
    """As JSON, a line for each row."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def read_figures(path: Path) -> dict[str, dict[str, float]]:
    """The accepted figures; none where there are none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
