"""`helix SUBCOMMAND`: one command line for everything. Subcommands are imported when they are called."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import cast

from helix_megatron.errors import did_you_mean, listed

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
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from helix_megatron import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    name = argv[0]
    if name not in FUNCTIONS:
        problem = f"{PROGRAM}: error: unknown subcommand {name!r}. Valid: {listed(FUNCTIONS)}."
        print(*(problem, *did_you_mean(name, FUNCTIONS)), file=sys.stderr)
        return 2
    module, _, function = FUNCTIONS[name].partition(":")
    run = getattr(importlib.import_module(f"helix_megatron.{module}"), function)
    try:
        return cast(Callable[[Sequence[str], str], int], run)(argv[1:], f"{PROGRAM} {name}")
    except BrokenPipeError:  # `helix … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def usage() -> str:
    """What `helix --help` prints."""
    width = max(map(len, FUNCTIONS))
    lines = [f"usage: {PROGRAM} SUBCOMMAND …", "", "subcommands:"]
    lines += [f"  {name:<{width}}  {text}" for name, text in HELP.items()]
    lines += ["", f"{PROGRAM} SUBCOMMAND --help explains each."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
