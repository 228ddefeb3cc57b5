"""Finished runs: read from their directories, and their losses compared.

Runs whose `run.json` has equal `model` entries train the same model, so their losses must agree; others are
never compared.
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.foreign import check_depth, read_bytes
from helix_megatron.errors import HelixError, listed
from helix_megatron.training.metrics import DESCRIPTION_FILE, METRICS_FILE, REQUIRED_ENTRIES

# The first iterations compile, allocate and connect: they say nothing about speed.
WARMUP_ITERATIONS = 3

MOST_BYTES = 1 << 28  # of a file: a record has about 500
JSON_NAMES = {str: "text", int: "a whole number", dict: "an object"}


@dataclass(frozen=True)
class Run:
    """One run: its description, and its records by iteration, ascending."""

    directory: Path
    description: Mapping[str, Any]
    records: Mapping[int, Mapping[str, Any]]

    @property
    def label(self) -> str:
        """Its name in tables, unique in a report."""
        return self.description["label"]

    @functools.cached_property
    def losses(self) -> dict[int, float]:
        """Language-model loss by iteration, nats per token; NaN where it was not finite."""
        return {i: _number(record["lm_loss"]) for i, record in self.records.items()}

    def same_model(self, other: Run) -> bool:
        return self.description["model"] == other.description["model"]

    def typical(self, metric: str) -> float | None:
        """Median after the warm-up; None when the metric was not recorded."""
        values = self._finite(metric)
        return statistics.median(values[WARMUP_ITERATIONS:] or values) if values else None

    def largest(self, metric: str) -> float | None:
        """Largest value; None when the metric was not recorded."""
        return max(self._finite(metric), default=None)

    def last(self, metric: str) -> float | None:
        """Latest value; None when the metric was not recorded."""
        return next(reversed(self._finite(metric)), None)

    def _finite(self, metric: str) -> list[float]:
        values = [_number(record.get(metric)) for record in self.records.values()]
        return [value for value in values if math.isfinite(value)]


@dataclass(frozen=True)
class Difference:
    """How far a run's losses lie from those of the run that it is compared with.

    Args:
        reference: label of the other run.
        by_iteration: |difference| at the iterations that both have, nats per token; infinite where a loss
            is not finite, so that it is within no limit.
    """

    reference: str
    by_iteration: Mapping[int, float]

    @property
    def iteration(self) -> int | None:
        """Where it is largest; None when the runs share no iteration."""
        return max(self.by_iteration, key=self.by_iteration.__getitem__, default=None)

    @property
    def largest(self) -> float | None:
        """The largest |difference|; None when the runs share no iteration."""
        return None if self.iteration is None else self.by_iteration[self.iteration]

    def within(self, limit: float) -> bool:
        """Whether every shared iteration, and at least one, differs by no more than `limit`."""
        return self.largest is not None and self.largest <= limit


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Args:
        runs: in the order in which they are shown.
        references: label of the run that each is compared with; None for a run that others are compared
            with, and for the only run of its model.
    """

    runs: Sequence[Run]
    references: Mapping[str, str | None]

    @functools.cached_property
    def differences(self) -> dict[str, Difference]:
        """By label, for the runs that are compared with another."""
        runs = {run.label: run for run in self.runs}
        return {
            label: loss_difference(runs[label], runs[reference])
            for label, reference in self.references.items()
            if reference is not None
        }

    def is_reference(self, run: Run) -> bool:
        return run.label in self.references.values()

    @property
    def milestones(self) -> list[int]:
        """The few iterations whose losses a table shows: 1, 10, 25, 50, 100, 250, ... and the last."""
        last = max(max(run.records) for run in self.runs)
        steps = [k * 10**e for e in range(1, len(str(last)) + 1) for k in (1, 2.5, 5)]
        return sorted({1, last, *[int(step) for step in steps if step < last][-4:]})


def compare(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """Compare every run with the first that trains the same model.

    Args:
        runs: at least one.
        baseline: label of the run to take, for its model, instead of the first.

    Raises:
        HelixError: two runs have one label, or none has the baseline's.
    """
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            places = [str(other.directory) for other in runs if other.label == run.label]
            raise HelixError(
                f"{len(places)} runs are called {run.label!r}: {listed(places)}. Give each run once, and "
                f"each a `label` of its own in its {DESCRIPTION_FILE}."
            )
    if baseline is not None and baseline not in labels:
        raise HelixError(f"no run is called {baseline!r}. Valid --baseline: {listed(labels)}.")
    # The sort is stable: the baseline first, the others in their order.
    candidates = sorted(runs, key=lambda run: run.label != baseline)
    first = {run.label: next(c.label for c in candidates if c.same_model(run)) for run in runs}
    return Comparison(runs, {label: None if own == label else own for label, own in first.items()})


def loss_difference(run: Run, reference: Run) -> Difference:
    """|difference| of the losses at the iterations that both runs have.

    An iteration that both skipped (fp16 overflow, the same in both) has no loss and does not count.
    """
    shared = [
        i
        for i in run.records.keys() & reference.records.keys()
        if not (run.records[i].get("skipped") and reference.records[i].get("skipped"))
    ]
    gaps = {i: abs(run.losses[i] - reference.losses[i]) for i in sorted(shared)}
    return Difference(
        reference.label, {i: gap if math.isfinite(gap) else math.inf for i, gap in gaps.items()}
    )


def read_run(directory: Path) -> Run:
    """Read `metrics.jsonl` and `run.json` of one run."""
    if not directory.is_dir():
        raise HelixError(
            f"{directory} is not a directory. Give the directories of finished runs, each with "
            f"{METRICS_FILE} and {DESCRIPTION_FILE}."
        )
    return Run(
        directory,
        _read_description(directory / DESCRIPTION_FILE),
        _read_records(directory / METRICS_FILE),
    )


def _read_description(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise HelixError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}). Repair the line, or train again."
        ) from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets
        raise HelixError(f"{path}: not JSON ({error}). Repair it, or train again.") from error
    check_depth(description, path)
    for entry, kind in REQUIRED_ENTRIES.items():
        if not isinstance(description, dict) or not isinstance(description.get(entry), kind):
            raise HelixError(
                f"{path}: the entry `{entry}` is missing or is not {JSON_NAMES[kind]}. A run's "
                f"description needs {listed(REQUIRED_ENTRIES)}; add it, or train again."
            )
    return description


def _read_records(path: Path) -> dict[int, dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            record = _parse_record(path, number, line)
            # A run resumed from a checkpoint repeats iterations: what came later counts.
            records[record["iteration"]] = record
    if not records:
        raise HelixError(
            f"{path} holds no iteration. The run ended before its first one; train again and read what "
            "it prints."
        )
    return dict(sorted(records.items()))


def _parse_record(path: Path, number: int, line: str) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", error)
        raise HelixError(
            f"{where}: not JSON ({reason}): {line[:60]!r}. A last line like this was cut off when the run was "
            "killed: delete it. Otherwise train again."
        ) from error
    check_depth(record, where)
    iteration = record.get("iteration") if isinstance(record, dict) else None
    if type(iteration) is not int or iteration < 1:
        raise HelixError(
            f"{where}: `iteration` is {iteration!r}; it must be a whole number of at least 1. Delete the "
            "line, or train again."
        )
    loss = record.get("lm_loss", "missing")
    if loss is not None and type(loss) not in (int, float):
        raise HelixError(
            f"{where}: `lm_loss` is {loss!r}; it must be a number, or null for a loss that is not finite. "
            "Delete the line, or train again."
        )
    return record


def _read_text(path: Path) -> str:
    if not os.path.lexists(path):
        flag = f" with --metrics-jsonl {path}" if path.name == METRICS_FILE else ""
        raise HelixError(
            f"{path} is missing: {path.parent} does not hold a run. Train{flag} first, or give another "
            "directory."
        )
    try:
        return read_bytes(path, MOST_BYTES, "Make it readable, or give another run.").decode()
    except UnicodeDecodeError as error:
        raise HelixError(
            f"{path}: byte {error.start} is not UTF-8 text. The file is damaged; train again."
        ) from error


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) else math.nan
