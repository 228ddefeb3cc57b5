"""`python -m helix_megatron.bench MEASUREMENT`: one measurement each, as a table and as JSON.

A measurement is a module with NAME, HELP, add_arguments(parser) and run(args) -> exit status; with
PASSES_FLAGS_ON it is run(args, flags that are not its own). It imports torch and megatron-core where it runs,
so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.bench import attention, convert, decode, layouts, serve, traffic
from helix_megatron.bench.result_file import PROGRAM
from helix_megatron.flags import OUTPUT_TEXT
from helix_megatron.outputs import check_file, results_alone

SUBCOMMANDS = (layouts, attention, decode, serve, convert, traffic)


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the measurement that `argv` names; its exit status, 2 for what the user can put right."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with exit_on_error(" ".join([program, *(word for word in argv[:1] if word[:1] != "-")])):
        parser = _parser(program)
        args, rest = parser.parse_known_args(argv)
        if rest and not args.passes_flags_on:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.argv = argv
        check_file("json", args.json)
        with results_alone(args.json):
            return args.run(args, rest) if args.passes_flags_on else args.run(args)
    raise AssertionError("exit_on_error leaves by itself")


def _parser(program: str) -> argparse.ArgumentParser:
    description = "Measure what partitioned attention costs and saves."
    parser = Parser(prog=program, description=description)
    names = {"metavar": "MEASUREMENT", "title": "measurements", "dest": "subcommand"}
    subcommands = parser.add_subparsers(required=True, **names)
    for module in SUBCOMMANDS:
        assert module.__doc__ is not None
        description = module.__doc__.partition(": ")[2]
        subparser = subcommands.add_parser(
            module.NAME,
            help=module.HELP,
            description=description[0].upper() + description[1:],
        )
        module.add_arguments(subparser)
        help_text = (
            "write the results there, with versions, date and command; - for standard output"
        )
        subparser.add_argument("--json", type=OUTPUT_TEXT, metavar="PATH", help=help_text)
        passes_flags_on = getattr(module, "PASSES_FLAGS_ON", False)
        subparser.set_defaults(run=module.run, passes_flags_on=passes_flags_on)
    return parser


if __name__ == "__main__":
    sys.exit(main())
