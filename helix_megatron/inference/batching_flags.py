"""Flags of the cache and of batching, for `helix generate` and `helix serve`. Starts without torch."""

from __future__ import annotations

import argparse
import math

from helix_megatron.errors import HelixError
from helix_megatron.inference.cache_layouts import NAMES

MOST_NUMBER = 2**31 - 1
MOST_RANKS = 4096


def add_engine_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group `cache and batching` to a parser and return the parser."""
    group = parser.add_argument_group("cache and batching")
    group.add_argument(
        "--cache-layout",
        choices=("auto", *NAMES),
        default="auto",
        help="how the ranks of a head group share keys and values: batch, whole heads of some sequences; "
        "sequence, whole heads of some positions; segment, segments of everything (default: %(default)s, "
        "which the cost model decides)",
    )
    group.add_argument(
        "--page-size", type=int, default=16, help="positions of a page (default: %(default)s)"
    )
    group.add_argument(
        "--cache-memory",
        type=float,
        metavar="GIB",
        help="memory of a rank for keys and values (default: what the longest contexts of all sequences need, "
        "as far as there is memory)",
    )
    group.add_argument(
        "--max-context",
        type=int,
        help="tokens of prompt and output of one sequence (default: what the model was trained for)",
    )
    group.add_argument(
        "--max-sequences",
        type=int,
        default=64,
        help="sequences that are generated at the same time (default: %(default)s)",
    )
    group.add_argument(
        "--prefill-chunk",
        type=int,
        default=512,
        help="tokens of prompts that are computed in one step, beside one token of every other sequence "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--explain",
        action="store_true",
        help="print the choice of the cache layout and the size of the cache",
    )
    return parser


def check_engine_arguments(namespace: argparse.Namespace) -> None:
    """Raise `HelixError` for a number that cannot be."""
    for name in ("page_size", "max_context", "max_sequences", "prefill_chunk", "nproc_per_node"):
        value = getattr(namespace, name)
        most = MOST_RANKS if name == "nproc_per_node" else MOST_NUMBER
        if value is not None and not 1 <= value <= most:
            raise HelixError(
                f"--{name.replace('_', '-')} is {value}. Give at least 1 and at most {most}, or leave it out."
            )
    if namespace.cache_memory is not None and not 0 < namespace.cache_memory < math.inf:
        raise HelixError(f"--cache-memory is {namespace.cache_memory}. Give GiB, more than 0.")
