"""`python -m helix_megatron.bench MEASUREMENT`: one measurement each, as a table and as JSON.

A measurement is a module with NAME, HELP, add_arguments(parser) and run(args) -> exit status. It imports torch
and megatron-core where it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helix_megatron.bench import attention, traffic
from helix_megatron.bench.report import PROGRAM, check_json_path
from helix_megatron.errors import exit_on_error

SUBCOMMANDS = (attention, traffic)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement that `argv` names; its exit status, 2 for what the user can put right."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(argv)
    args.argv = argv
    with exit_on_error(f"{PROGRAM} {args.subcommand}"):
        check_json_path(args.json)
        return args.run(args)
    raise AssertionError("exit_on_error leaves by itself")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Measure what partitioned attention costs and saves."
    )
    subcommands = parser.add_subparsers(
        dest="subcommand", required=True, metavar="MEASUREMENT", title="measurements"
    )
    for module in SUBCOMMANDS:
        assert module.__doc__ is not None
        description = module.__doc__.partition(": ")[2]
        subparser = subcommands.add_parser(
            module.NAME, help=module.HELP, description=description[0].upper() + description[1:]
        )
        module.add_arguments(subparser)
        subparser.add_argument(
            "--json",
            metavar="PATH",
            help="write the results there, with versions, date and command",
        )
        subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
