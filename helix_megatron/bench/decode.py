"""`bench decode`: one decode step at a long context: each cache layout, and stock Megatron's replicated cache.

The same model with the same keys and values in every cache: Helix with the cache layouts batch, sequence and
segment, and megatron-core with more tensor parallel ranks than key-value heads, which gathers QKV and keeps
every head p/g times. Logits are compared before anything is timed. Every step computes the same position again.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from helix_megatron.bench.contest import milliseconds, run_cases, times
from helix_megatron.bench.decode_case import STOCK, STOCK_PAGED, DecodeCase, Measured
from helix_megatron.bench.spawn import SIZE, hide_gpus
from helix_megatron.bench.timing import compare
from helix_megatron.core.caches import SEGMENTS
from helix_megatron.errors import HelixError
from helix_megatron.flags import add_flags, values_of
from helix_megatron.run.rank_environment import launched_ranks
from helix_megatron.tables import text_table

NAME = "decode"
HELP = (
    "a decode step at a long context: cache layouts and stock Megatron's, side by side (gloo, CPU)"
)
RIVALS = (STOCK, STOCK_PAGED, SEGMENTS)  # what the others are compared with
LEGEND = f"""\
ms: one token of every sequence, until the last rank is done; median [quartiles]. CPU ms: of all ranks together.
vs NAME: how many times as fast, ratio of medians (median of ratios within a turn). sent: bytes that a rank
sends in attention per token, all layers. cache: bytes of keys and values on all ranks; copies: of each of them.
{STOCK}: megatron-core's static context, which turns all keys by their positions again in every step.
{STOCK_PAGED}: its gathered QKV and replicated cache in this package's engine, so that only these differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, DecodeCase)
    parser.add_argument(
        "--context",
        type=SIZE,
        nargs="+",
        default=[DecodeCase.context],
        metavar="N",
        help="positions that a token attends to; several are measured one by one "
        f"(default: {DecodeCase.context})",
    )
    help_text = "timed steps of each, in turns (default: %(default)s)"
    parser.add_argument("--turns", type=SIZE, default=11, metavar="N", help=help_text)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 where the bytes are not those of a formula."""
    hide_gpus()
    if launched_ranks() is not None:
        raise HelixError("this starts its ranks by itself. Run it without torchrun.")
    settings = values_of(DecodeCase, vars(args))
    cases = [DecodeCase(**settings | {"context": context}) for context in args.context]
    texts: dict[str, Any] = {"summary": summary, "describe": describe, "legend": LEGEND}
    return run_cases(args, cases, _measure, args.turns, **texts)


def _measure(case: DecodeCase, turns: int) -> Measured:
    from helix_megatron.bench.decode_ranks import measure_decode

    return measure_decode(case, turns)


def summary(case: DecodeCase, measured: Measured) -> dict[str, Any]:
    """What is printed and written: of each contestant time, bytes and memory, and how it compares."""
    contestants = {
        name: times(samples)
        | {
            "times_as_long": {rival: compare(measured.samples[rival], samples) for rival in RIVALS},
            "sent_bytes_per_token": measured.sent_bytes[name] / case.ranks / case.sequences,
            "sent_bytes_per_token_by_formula": case.sent_bytes(name),
            "cache_bytes": measured.cache_bytes[name],
            "cache_copies": measured.cache_bytes[name] / case.copy_bytes,
            "difference_of_logits": measured.differences[name],
        }
        for name, samples in measured.samples.items()
    }
    return {
        "case": dataclasses.asdict(case),
        "head_groups": case.layout.head_groups,
        "segments": case.layout.segments,
        "query_layout": case.layout.query_layout,
        "contestants": contestants,
    }


def describe(result: dict[str, Any]) -> str:
    """The table of one case."""
    case, contestants = result["case"], result["contestants"]
    rows = []
    for name, found in contestants.items():
        ratios = [
            "" if rival == name else f"{ratio['medians']:.2f} ({ratio['pairs']:.2f})"
            for rival, ratio in found["times_as_long"].items()
        ]
        sent, cache = f"{found['sent_bytes_per_token']:,.0f}", f"{found['cache_bytes']:,}"
        copies = f"{found['cache_copies']:.2f}"
        rows.append((name, *milliseconds(found), *ratios, sent, cache, copies))
    largest = max(found["difference_of_logits"] for found in contestants.values())
    header = ("", "ms", "CPU ms", *(f"vs {rival}" for rival in RIVALS), "sent", "cache", "copies")
    return (
        f"Decode step, fp32: {case['sequences']} sequences at context {case['context']:,}; {case['layers']} "
        f"layers, hidden {case['hidden_size']}, {case['heads']} query heads, {case['kv_heads']} key-value "
        f"heads of {case['head_dim']}.\n{case['ranks']} ranks: {result['head_groups']} head groups of "
        f"{result['segments']} segments, query layout {result['query_layout']}. Logits equal within "
        f"{largest:.0e} of the largest.\n" + text_table(header, rows)
    )
