"""The command-line flags, for any `argparse` parser: Megatron's own, or a script's."""

from __future__ import annotations

import argparse
import dataclasses

from helix_megatron.config import HelixConfig

FLAGS = {
    "intra_head_parallel_size": "--intra-head-parallel-size",
    "attention": "--helix-attention",
    "exchange": "--helix-exchange",
    "query_layout": "--helix-query-layout",
}


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
