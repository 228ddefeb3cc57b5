"""`scripts/reproduce_paper.py`: measure where asked, simulate, draw, write."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.flags import OUTPUT_DIRECTORY, whole

DESCRIPTION = """\
Write docs/paper.md with its pictures. Simulations run every time, in a minute. Measurements (16 ranks, and
training curves of three seeds; about an hour on 2 cores) are read from docs/paper/, where --measure and --train
put them. To measure again, delete docs/paper/measured-*.json."""
CURVES = "curves.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Do as the arguments say. Wrong input prints one paragraph and exits with 2."""
    parser = Parser(prog="reproduce_paper.py", description=DESCRIPTION)
    add = parser.add_argument
    add(
        "--measure", action="store_true", help="measure the layouts on 16 ranks, as far as not done"
    )
    add("--train", action="store_true", help="train the curves again")
    add(
        "--rounds",
        type=whole(largest=10**6),
        default=2,
        help="turns of the measurement (default: %(default)s)",
    )
    add(
        "--iterations",
        type=whole(largest=10**6),
        default=3,
        help="timed in each turn (default: %(default)s)",
    )
    add(
        "--out", type=OUTPUT_DIRECTORY, default="docs", metavar="DIR", help="(default: %(default)s)"
    )
    with exit_on_error(parser.prog):
        _run(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from paper import curves, measured
    from paper.document import document
    from paper.plots import draw_all

    out = Path(args.out)
    directory = out / "paper"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HelixError(f"--out {args.out} cannot be written to: {error.strerror}.") from error
    start = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - start:6.0f} s] {text}", file=sys.stderr, flush=True)

    if args.measure:
        measured.measure(directory, args.rounds, args.iterations, say)
    if args.train:
        found = curves.measure(say=say)
        (directory / CURVES).write_text(curves.to_json(found))
    names = [
        measured.file_name(kind, n) for kind in measured.KINDS for n in measured.IN_FLIGHT[kind]
    ]
    missing = [name for name in [*names, CURVES] if not (directory / name).exists()]
    if missing:
        raise HelixError(
            f"{directory} lacks {', '.join(missing)}. Run with --measure (layouts) or --train (curves) first."
        )
    trained = json.loads((directory / CURVES).read_text())
    say("simulating and drawing")
    pictures = draw_all(directory, trained)
    (out / "paper.md").write_text(document(directory, trained))
    say("done")
    print(f"written: {out / 'paper.md'}, {', '.join(f'paper/{name}' for name in pictures)}")
