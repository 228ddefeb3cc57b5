"""Flags for any `argparse` parser, Megatron's own or a script's, and errors as a command line shows them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
from collections.abc import Iterator

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError, LaunchError, Setting

FLAGS = {
    "intra_head_parallel_size": "--intra-head-parallel-size",
    "attention": "--helix-attention",
    "exchange": "--helix-exchange",
    "query_layout": "--helix-query-layout",
    "kernel": "--helix-kernel",
}
# Megatron's flags that are not called like the settings that they set.
OTHER_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def as_flag(setting: Setting) -> str:
    """Word a setting as a flag of a command line: `--helix-exchange auto`."""
    name = setting.name
    flag = FLAGS.get(name) or OTHER_FLAGS.get(name) or "--" + name.replace("_", "-")
    return flag if setting.value is None else f"{flag} {setting.value}"


def add_helix_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `helix` to a parser and return the parser.

    `HelixConfig.from_args` reads the result. The flags' help is the configuration's own.
    """
    group = parser.add_argument_group("helix", "two-level attention partitioning")
    for setting in dataclasses.fields(HelixConfig):
        choices = setting.metadata["choices"]
        group.add_argument(
            FLAGS[setting.name],
            type=type(setting.default),
            default=setting.default,
            choices=choices,
            metavar=None if choices else "M",
            help=f"{setting.metadata['help']} (default: %(default)s)",
        )
    return parser


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Turn a `HelixError` into one paragraph on standard error and exit code 2, and Ctrl-C into a line and 130.

    Under a launcher only the first rank prints, so that eight ranks do not say the same thing eight times.
    """
    try:
        yield
    except HelixError as error:
        if isinstance(error, LaunchError) or os.environ.get("RANK", "0") == "0":
            text = textwrap.fill(
                f"{program}: error: {error.worded(as_flag)}",
                width=100,
                break_on_hyphens=False,  # paths and flags stay whole, to be copied
                break_long_words=False,
            )
            print(text, file=sys.stderr, flush=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
