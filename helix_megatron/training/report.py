"""Training runs side by side: a table here, a picture, numbers and a page in a directory.

    python -m helix_megatron.training.report runs/dense runs/helix --out runs/report --max-difference 1e-4

Exit code 0: done. 1: losses of runs that train the same model are not within `--max-difference` (the
report is written all the same). 2: a file or a flag is wrong.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.training.metrics import json_safe
from helix_megatron.training.report_html import html_report
from helix_megatron.training.report_picture import DARK, draw_losses
from helix_megatron.training.report_runs import Comparison, compare, read_run
from helix_megatron.training.report_table import difference_sentence, table_numbers, table_text

PROGRAM = "helix_megatron.training.report"


def write_report(comparison: Comparison, out: Path, command: str) -> list[Path]:
    """Write `losses.png`, `report.json` and `report.html` into a directory.

    Args:
        comparison: the runs.
        out: the directory; made when it does not exist.
        command: the command line that makes the report, for its reader.

    Returns:
        The three files.

    Raises:
        HelixError: a file cannot be written.
    """
    picture = draw_losses(comparison)
    numbers = json_safe({"command": command, "runs": table_numbers(comparison)})
    files = {
        out / "losses.png": picture,
        out / "report.json": (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
        out / "report.html": html_report(
            comparison, picture, draw_losses(comparison, DARK), command
        ).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise HelixError(
            f"cannot write the report to {out}: {error.strerror}. Give --out a directory that you may "
            "write to."
        ) from error
    return list(files)


def disagreements(comparison: Comparison, limit: float) -> list[str]:
    """A sentence for every run whose losses are not within `limit` of those that they must equal.

    Raises:
        HelixError: no two runs train the same model, so that nothing would be checked.
    """
    if not comparison.differences:
        raise HelixError(
            "no two of these runs train the same model (their `model` entries in run.json differ), so "
            "--max-difference has nothing to check. Add the run to compare with, or leave the flag out."
        )
    return [
        difference_sentence(label, difference)
        for label, difference in comparison.differences.items()
        if not difference.within(limit)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code; flags and files that are wrong exit with code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(arguments)
    # A terminal whose encoding lacks a dash or a line shows a question mark instead of ending in an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with exit_on_error(PROGRAM):
        comparison = compare([read_run(path) for path in options.runs], options.baseline)
        files = write_report(
            comparison, options.out, shlex.join(["python", "-m", PROGRAM, *arguments])
        )
        print(table_text(comparison), end="\n\n")
        for label, difference in comparison.differences.items():
            print(difference_sentence(label, difference))
        for path in files:
            print(f"wrote {path}")
        wrong = []
        if options.max_difference is not None:
            wrong = disagreements(comparison, options.max_difference)
    for sentence in wrong:
        print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    if wrong:
        print(
            f"{PROGRAM}: that is not within --max-difference {options.max_difference:g}. Compare the runs' "
            "settings in report.html: seed, precision, global batch and data must be the same.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROGRAM}", description="Shows training runs side by side."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="directory of a run, with metrics.jsonl and run.json",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where losses.png, report.json and report.html go",
    )
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="compare runs of its model with this one, instead of with the first",
    )
    parser.add_argument(
        "--max-difference",
        type=_limit,
        metavar="NATS",
        help="exit with code 1 when losses of runs that train the same model differ by more",
    )
    return parser


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of at least 0. For fp32 try 1e-4."
        )
    return value


if __name__ == "__main__":
    sys.exit(main())
