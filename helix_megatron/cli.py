"""`helix SUBCOMMAND`: one command line for everything. Subcommands are imported when they are called."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import cast

from helix_megatron.arguments import exit_on_error
from helix_megatron.errors import HelixError, did_you_mean

PROGRAM = "helix"
# Subcommand → the function(argv, program) -> exit status that runs it.
FUNCTIONS = {
    "plan": "plan.command:plan_main",
    "simulate": "plan.command:simulate_main",
    "graph": "graph.command:main",
    "bench": "bench.__main__:main",
    "convert": "checkpoint.command:main",
    "generate": "inference.command:main",
    "serve": "serving.command:main",
    "doctor": "doctor:main",
}
HELP = {
    "plan": "rank the layouts of a model on a cluster by predicted time (simulated)",
    "simulate": "show one layout operator by operator, and write its pipeline's trace (simulated)",
    "graph": "trace the operator graph of a run, check it, and draw it",
    "bench": "measure layouts side by side on this machine",
    "convert": "convert checkpoints between Hugging Face, Megatron and files per rank",
    "generate": "generate text from a checkpoint, at any layout",
    "serve": "serve a checkpoint over HTTP as OpenAI does",
    "doctor": "tell what works in this environment, or whether Helix fits a Megatron-LM checkout",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that `argv` names; its exit status, 2 for what the user can put right."""
    with exit_on_error(PROGRAM):
        return _run(list(sys.argv[1:] if argv is None else argv))
    raise AssertionError("exit_on_error leaves by itself")


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from helix_megatron import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    name = argv[0]
    if name not in FUNCTIONS:
        remedy = did_you_mean(name, FUNCTIONS)
        raise HelixError(f"unknown subcommand {name!r}.", valid=FUNCTIONS, remedy=remedy)
    module, _, function = FUNCTIONS[name].partition(":")
    run = getattr(importlib.import_module(f"helix_megatron.{module}"), function)
    return cast(Callable[[Sequence[str], str], int], run)(argv[1:], f"{PROGRAM} {name}")


def usage() -> str:
    """What `helix --help` prints."""
    width = max(map(len, FUNCTIONS))
    lines = [f"usage: {PROGRAM} SUBCOMMAND …", "", "subcommands:"]
    lines += [f"  {name:<{width}}  {text}" for name, text in HELP.items()]
    lines += ["", f"{PROGRAM} SUBCOMMAND --help explains each."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
