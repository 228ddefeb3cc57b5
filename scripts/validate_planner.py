#!/usr/bin/env python3
"""`python scripts/validate_planner.py [TABLE.csv …]`: predictions against published runs.

Without a table, or with several, it prints how far the planner is off in each that is published in this
repository (`scripts/published`) and in those that are named, none of them fitted to itself (`held_out`),
and fails where an error has grown since the last accepted version. With one table it prints every row.

A table has the columns of vTrain's iteration times (A100, bf16), of NVIDIA NeMo's throughput (DGX H100,
FP8), or of one in `scripts/published`; its header says which. No constant of the model belongs to a row:
the only number that was fitted to such tables is the share of its peak that a chip sustains
(`Chip.sustained`). `--hold-out` fits it again without each model, and predicts that model.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from held_out import OWN, figures, grown, read_figures, results_of, rows_of, rows_text
from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import INPUT_FILE, OUTPUT_TEXT
from helix_megatron.outputs import check_file, results_alone, write_text
from helix_megatron.plan.clusters import Cluster, cluster_of
from helix_megatron.plan.score import Prediction, predict_training
from helix_megatron.plan.settings import Scenario
from helix_megatron.tables import text_table
from published_tables import FOLDER, groups_of, published, with_share
from training_tables import Run, read_table

PROGRAM = "python scripts/validate_planner.py"
ACCEPTED = FOLDER / "errors.json"
EVIDENCE = Path(__file__).parents[1] / "helix_megatron" / "plan" / "evidence.json"


def predict(runs: Sequence[Run], cluster: Cluster) -> list[Prediction]:
    """What the planner says of each."""
    return [predict_training(Scenario(r.model, r.job, cluster, r.software), r.layout) for r in runs]


def fit_share(runs: Sequence[Run], cluster: Cluster, precision: str) -> float:
    """The sustained share that makes the median error zero, by bisection."""
    low, high = 0.1, 1.0
    while high - low > 0.002:
        middle = (low + high) / 2
        found = predict(runs, with_share(cluster, precision, middle))
        error = statistics.median(
            p.seconds / r.seconds - 1 for p, r in zip(found, runs, strict=True)
        )
        low, high = (middle, high) if error > 0 else (low, middle)
    return (low + high) / 2


def hold_out(runs: Sequence[Run], cluster: Cluster, precision: str) -> list[float]:
    """Predicted seconds of every run, its model left out of the fit."""
    seconds = [0.0] * len(runs)
    for label in {run.label for run in runs}:
        rest = [run for run in runs if run.label != label]
        share = fit_share(rest, cluster, precision) if rest else cluster.chip.sustained[precision]
        own = [i for i, run in enumerate(runs) if run.label == label]
        found = predict([runs[i] for i in own], with_share(cluster, precision, share))
        for i, prediction in zip(own, found, strict=True):
            seconds[i] = prediction.seconds
    return seconds


# --------------------------------------------------------------------------- statistics


def mean_error(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute percentage error."""
    return 100 * statistics.mean(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))


def constant_guess(runs: Sequence[Run]) -> tuple[float, list[float]]:
    """(FLOP/s of a GPU, seconds of every run) if all ran at one rate, the best one for these very runs."""
    flops = [
        r.model.flops_per_token(r.job.sequence)
        * r.job.global_batch
        * r.job.sequence
        / r.layout.gpus
        for r in runs
    ]
    measured = [run.seconds for run in runs]
    # The mean of |a/c − 1| is piecewise monotone between the achieved rates a: one of them is the best c.
    rates = [f / s for f, s in zip(flops, measured, strict=True)]
    best = min(rates, key=lambda rate: mean_error([f / rate for f in flops], measured))
    return best, [f / best for f in flops]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; ties share their mean rank. 1 where there is nothing to order."""
    ranks = [_ranks(a), _ranks(b)]
    if len(a) < 2 or any(len(set(r)) < 2 for r in ranks):
        return 1.0
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first = {value: i for i, value in reversed(list(enumerate(order)))}
    count = {value: order.count(value) for value in first}
    return [first[value] + (count[value] - 1) / 2 for value in values]


# -------------------------------------------------------------------------- command line


def evaluate(path: Path, cluster_name: str | None, leave_out: bool) -> dict[str, Any]:
    """All figures of one table."""
    table = read_table(path)
    kind, runs = table.kind, table.runs
    cluster = cluster_of(cluster_name or kind.cluster)
    if kind.precision not in cluster.chip.flops:
        raise HelixError(
            f"chip {cluster.chip.name} has no {kind.precision}, which this table is of."
        )
    predictions = predict(runs, cluster)
    measured = [run.seconds for run in runs]
    predicted = [prediction.seconds for prediction in predictions]
    rate, guessed = constant_guess(runs)
    gpu_rates = [
        [
            p.model_flops / seconds / p.layout.gpus
            for p, seconds in zip(predictions, column, strict=True)
        ]
        for column in (measured, predicted)
    ]
    result: dict[str, Any] = {
        "table": str(path),
        "cluster": cluster.name,
        "sustained_share": cluster.chip.sustained[kind.precision],
        "rows": [
            {
                "model": run.label,
                "layout": run.layout.describe(),
                "micro_batch": run.layout.micro_batch,
                "micro_batches": p.micro_batches,
                "measured_seconds": run.seconds,
                "predicted_seconds": p.seconds,
                "error_percent": 100 * (p.seconds / run.seconds - 1),
            }
            for run, p in zip(runs, predictions, strict=True)
        ],
        "refused": [{"line": line, "reason": reason} for line, reason in table.refused],
        "ignored_columns": table.ignored,
        "mean_error_percent": mean_error(predicted, measured),
        "median_error_percent": 100
        * statistics.median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)),
        "constant_guess_tflops": rate / 1e12,
        "constant_guess_error_percent": mean_error(guessed, measured),
        "rank_correlation_seconds": rank_correlation(predicted, measured),
        "rank_correlation_flops": rank_correlation(*gpu_rates),
    }
    if leave_out:
        held = hold_out(runs, cluster, kind.precision)
        result["held_out_error_percent"] = mean_error(held, measured)
    return result


def describe(result: dict[str, Any]) -> str:
    """The figures as text."""
    rows = [
        (
            row["model"],
            row["layout"],
            f"{row['micro_batch']} × {row['micro_batches']}",
            f"{row['measured_seconds']:.3f}",
            f"{row['predicted_seconds']:.3f}",
            f"{row['error_percent']:+.1f}%",
        )
        for row in result["rows"]
    ]
    head = ("model", "layout", "micro-batch", "measured s", "simulated s", "error")
    lines = [text_table(head, rows, left=2, indent="")]
    lines += [f"line {r['line']} not predicted: {r['reason']}" for r in result["refused"]]
    if result["ignored_columns"]:
        lines.append(f"columns not used: {listed(result['ignored_columns'])}")
    count = len(result["rows"])
    lines += [
        "",
        f"{count} rows on {result['cluster']}; simulated with one fitted number, the sustained share "
        f"{result['sustained_share']} of the chip's peak",
        f"mean absolute percentage error   {result['mean_error_percent']:.2f} %",
        f"median                           {result['median_error_percent']:.2f} %",
        f"constant-TFLOPS guess            {result['constant_guess_error_percent']:.2f} %   "
        f"({result['constant_guess_tflops']:.0f} TFLOP/s, the best for these rows)",
        f"rank correlation                 {result['rank_correlation_seconds']:.3f} of seconds, "
        f"{result['rank_correlation_flops']:.3f} of FLOP/s per GPU",
    ]
    if "held_out_error_percent" in result:
        lines.append(f"each model left out of the fit   {result['held_out_error_percent']:.2f} %")
    return "\n".join(lines)


def summarise(paths: Sequence[Path], accept: bool) -> int:
    """Print the errors of the published tables and of others; 1 where one has grown."""
    results = results_of([group for path in (*published(), *paths) for group in groups_of(path)])
    found, right = (sum(result.pairs[i] for result in results) for i in (0, 1))
    head = ("table", "rows", "error", "guess", "memory", "worst", "which row")
    rows = []
    for result in results:
        error, row = result.worst
        memory = "" if result.memory is None else f"{result.memory:.1f}%"
        figures_ = f"{result.mean:.1f}%", f"{result.guess:.1f}%", memory, f"{error:+.0f}%"
        rows.append((result.group.name, str(len(result.group.points)), *figures_, row))
    print(text_table(head, rows, left=1, indent=""))
    for result in results:
        if result.fitted_on != OWN:
            print(f"{result.group.name}: the sustained share is {result.fitted_on}")
    print(f"order: {right} of {found} pairs that differ by more than 5 % ({right / found:.1%})")
    now, before = figures(results), read_figures(ACCEPTED)
    if accept:
        write_text(str(ACCEPTED), json.dumps(before | now, indent=1) + "\n")
        write_text(str(EVIDENCE), rows_text(rows_of(results)))
        return 0
    problems = grown(now, before)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures of a table."""
    parser = Parser(
        prog=PROGRAM,
        description="Compare simulated iteration times with a table of measured ones.",
    )
    parser.add_argument("tables", type=INPUT_FILE, metavar="TABLE.csv", nargs="*")
    parser.add_argument(
        "--cluster", type=INPUT_FILE, help="where it ran; the table's kind decides when not given"
    )
    parser.add_argument(
        "--hold-out", action="store_true", help="also fit the sustained share without each model"
    )
    parser.add_argument(
        "--accept", action="store_true", help="of all tables: the errors are those to compare with"
    )
    parser.add_argument(
        "--json",
        type=OUTPUT_TEXT,
        metavar="PATH",
        help="write the figures there; - for standard output",
    )
    with exit_on_error(PROGRAM):
        args = parser.parse_args(argv)
        check_file("json", args.json)
        if len(args.tables) != 1:
            return summarise([Path(table) for table in args.tables], args.accept)
        result = evaluate(Path(args.tables[0]), args.cluster, args.hold_out)
        if args.json is not None:
            write_text(args.json, json.dumps(result, indent=2) + "\n")
        with results_alone(args.json):
            print(describe(result))
        return 0
    raise AssertionError("exit_on_error leaves by itself")


if __name__ == "__main__":
    sys.exit(main())
