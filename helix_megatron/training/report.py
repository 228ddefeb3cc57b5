"""Training runs side by side: a table here, a picture, numbers and a page in a directory.

    python -m helix_megatron.training.report runs/dense runs/helix --out runs/report --max-difference 1e-4

Exit code 0: done. 1: losses of runs that train the same model are not within `--max-difference` (the
report is written all the same). 2: a file or a flag is wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.flags import INPUT_DIRECTORY, OUTPUT_DIRECTORY, one_line, real
from helix_megatron.outputs import check_free
from helix_megatron.training.metrics import json_safe
from helix_megatron.training.report_html import html_report
from helix_megatron.training.report_picture import DARK, draw_losses
from helix_megatron.training.report_runs import Comparison, compare, read_run
from helix_megatron.training.report_table import difference_sentence, table_numbers, table_text

PROGRAM = "helix_megatron.training.report"
FILES = ("losses.png", "report.json", "report.html")


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
    contents = (
        picture,
        (json.dumps(numbers, indent=2, allow_nan=False) + "\n").encode(),
        html_report(comparison, picture, draw_losses(comparison, DARK), command).encode(),
    )
    files = [out / name for name in FILES]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in zip(files, contents, strict=True):
            path.write_bytes(content)
    except OSError as error:
        raise HelixError(
            f"cannot write the report to {out}: {error.strerror}. Give --out a directory that you may "
            "write to."
        ) from error
    return files


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
    with exit_on_error(PROGRAM):
        options = _parser().parse_args(arguments)
        out = Path(options.out)
        check_free([out / name for name in FILES], overwrite=options.overwrite)
        comparison = compare([read_run(Path(path)) for path in options.runs], options.baseline)
        files = write_report(comparison, out, shlex.join(["python", "-m", PROGRAM, *arguments]))
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
    parser = Parser(prog=f"python -m {PROGRAM}", description="Shows training runs side by side.")
    parser.add_argument(
        "runs",
        nargs="+",
        type=INPUT_DIRECTORY,
        metavar="RUN_DIR",
        help="directory of a run, with metrics.jsonl and run.json",
    )
    parser.add_argument(
        "--out",
        type=OUTPUT_DIRECTORY,
        required=True,
        metavar="DIR",
        help="where losses.png, report.json and report.html go",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the report that is in that directory"
    )
    parser.add_argument(
        "--baseline",
        type=one_line,
        metavar="LABEL",
        help="compare runs of its model with this one, instead of with the first",
    )
    parser.add_argument(
        "--max-difference",
        type=real(),
        metavar="NATS",
        help="exit with code 1 when losses of runs that train the same model differ by more",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
