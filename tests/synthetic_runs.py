"""Metrics and finished runs made by hand, for the tests of what reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from helix_megatron.training.metrics import IterationMetrics
from helix_megatron.training.report_runs import Comparison, compare, read_run
from helix_megatron.training.report_table import table_rows

DENSE = {"layers": 4, "hidden_size": 128, "heads": 2}
MIXTURE = {**DENSE, "experts": 8}
STOCK = {"tp": 1, "pp": 1, "dp": 1, "ep": 1, "m": 1, "n": 1}
HELIX = {**STOCK, "tp": 4, "m": 2, "n": 2, "attention": "exact", "exchange": "all-to-all"}


def curve(length: int) -> list[float]:
    return [2 + 3 * math.exp(-i / 20) for i in range(1, length + 1)]


def write_run(directory: Path, losses: list[float | None], **description) -> Path:
    """A run by hand, independent of the writers; its first three iterations are ten times slower."""
    directory.mkdir(parents=True)
    entries = {"label": directory.name, "ranks": 1, "layout": STOCK, "model": DENSE} | description
    (directory / "run.json").write_text(json.dumps(entries))
    lines = [
        {
            "iteration": i,
            "lm_loss": loss,
            "tokens_per_second": 10_000 if i > 3 else 1000,
            "comm_ms_per_token": 0.0123,
            "attention_bytes_per_token": 3072,
            "other_bytes_per_token": 12288.4,
            "memory_bytes": (400 + (i == 2)) * 2**20,
        }
        for i, loss in enumerate(losses, start=1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def write_three(root: Path, difference: float = 3e-7) -> list[Path]:
    """The quickstart's three runs."""
    losses = curve(50)
    near = [*losses[:36], losses[36] + difference, *losses[37:]]
    return [
        write_run(root / "stock", losses, command="python -m train --label stock"),
        write_run(root / "helix", near, ranks=4, layout=HELIX, command="torchrun -m train"),
        write_run(
            root / "mixture", [x - 0.2 for x in losses], ranks=4, layout=HELIX, model=MIXTURE
        ),
    ]


def read(*directories: Path, baseline: str | None = None) -> Comparison:
    return compare([read_run(directory) for directory in directories], baseline)


def rows_of(comparison: Comparison) -> dict[str, list[str]]:
    return dict(table_rows(comparison))


def example(iteration: int = 12, **changes) -> IterationMetrics:
    values = {
        "iteration": iteration,
        "lm_loss": 3.21449,
        "grad_norm": 1.2345,
        "learning_rate": 1e-3,
        "tokens_per_second": 10_234.0,
        "iteration_ms": 300.0,
        "comm_ms_per_token": 0.01234,
        "attention_bytes_per_token": 3072.0,
        "other_bytes_per_token": 12288.0,
        "memory_bytes": 412 * 2**20,
        "consumed_samples": 96,
        "consumed_tokens": 12_288,
        "elapsed_seconds": 3.5,
    }
    return IterationMetrics(**(values | changes))
