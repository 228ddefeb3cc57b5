"""`bench decode`: one decode step at a long context: each cache layout, and stock Megatron's replicated cache.

The same model with the same keys and values in every cache: Helix with the cache layouts batch, sequence and
segment, and megatron-core with more tensor parallel ranks than key-value heads, which gathers QKV and keeps
every head p/g times. Logits are compared before anything is timed. Every step computes the same position again.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from helix_megatron.bench.decode_case import STOCK, STOCK_PAGED, DecodeCase, Measured
from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.spawn import hide_gpus, run_on_ranks
from helix_megatron.bench.timing import Spread, compare
from helix_megatron.config import QUERY_LAYOUTS
from helix_megatron.core.caches import SEGMENTS
from helix_megatron.errors import HelixError
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
    def number(flag: str, name: str, text: str) -> None:
        default = getattr(DecodeCase, name)
        shown = "ranks / key-value heads" if default is None else default
        parser.add_argument(
            flag,
            type=int,
            dest=name,
            default=default,
            metavar="N",
            help=f"{text} (default: {shown})",
        )

    number("--heads", "heads", "query heads")
    number("--kv-heads", "kv_heads", "key-value heads, fewer than ranks")
    number("--ranks", "ranks", "tensor parallel ranks")
    number("--segments", "segments", "segments of a head: ranks that share one copy of its cache")
    number("--head-dim", "head_dim", "dimensions of a head")
    number("--hidden-size", "hidden_size", "of the model")
    number("--layers", "layers", "of the model")
    number("--sequences", "sequences", "that get one token each")
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        default=[DecodeCase.context],
        metavar="N",
        help="positions that a token attends to; several are measured one by one "
        f"(default: {DecodeCase.context})",
    )
    parser.add_argument(
        "--query-layout",
        choices=QUERY_LAYOUTS,
        default="auto",
        help="heads deals query heads whole, segments cuts them (default: %(default)s)",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=11,
        metavar="N",
        help="timed steps of each, in turns (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 1 where the bytes are not those of a formula."""
    hide_gpus()
    if launched_ranks() is not None:
        raise HelixError("this starts its ranks by itself. Run it without torchrun.")
    if args.turns < 1:
        raise HelixError(f"--turns {args.turns} must be at least 1.")
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(DecodeCase)}
    cases = [DecodeCase(**{**settings, "context": context}) for context in args.context]
    results = []
    for case in cases:
        results.append(summary(case, run_on_ranks(_measure, case, args.turns, ranks=case.ranks)))
        print(describe(results[-1]) + "\n", flush=True)
    print(LEGEND)
    write_json(args.json, args.argv, results)
    if all(as_predicted(result) for result in results):
        return 0
    print("The bytes that were sent differ from a formula: one of them is wrong.")
    return 1


def _measure(case: DecodeCase, turns: int) -> Measured:
    from helix_megatron.bench.decode_ranks import measure_decode

    return measure_decode(case, turns)


def summary(case: DecodeCase, measured: Measured) -> dict[str, Any]:
    """What is printed and written: of each contestant time, bytes and memory, and how it compares."""
    contestants = {}
    for name, samples in measured.samples.items():
        tokens = case.ranks * case.sequences
        contestants[name] = {
            "wall_seconds": dataclasses.asdict(Spread.of(samples.wall)),
            "cpu_seconds": Spread.of(samples.cpu).median,
            "times_as_long": {rival: compare(measured.samples[rival], samples) for rival in RIVALS},
            "sent_bytes_per_token": measured.sent_bytes[name] / tokens,
            "sent_bytes_per_token_by_formula": case.sent_bytes(name),
            "cache_bytes": measured.cache_bytes[name],
            "cache_copies": measured.cache_bytes[name] / case.copy_bytes,
            "difference_of_logits": measured.differences[name],
        }
    return {
        "case": dataclasses.asdict(case),
        "head_groups": case.layout.head_groups,
        "segments": case.layout.segments,
        "query_layout": case.layout.query_layout,
        "contestants": contestants,
    }


def as_predicted(result: dict[str, Any]) -> bool:
    """Whether everybody sent the bytes that its formula says."""
    return all(
        found["sent_bytes_per_token"] == found["sent_bytes_per_token_by_formula"]
        for found in result["contestants"].values()
    )


def describe(result: dict[str, Any]) -> str:
    """The table of one case."""
    case, contestants = result["case"], result["contestants"]
    rows = []
    for name, found in contestants.items():
        wall = found["wall_seconds"]
        ratios = [
            "" if rival == name else f"{ratio['medians']:.2f} ({ratio['pairs']:.2f})"
            for rival, ratio in found["times_as_long"].items()
        ]
        rows.append(
            (
                name,
                f"{wall['median'] * 1e3:.1f} [{wall['low'] * 1e3:.1f}, {wall['high'] * 1e3:.1f}]",
                f"{found['cpu_seconds'] * 1e3:.0f}",
                *ratios,
                f"{found['sent_bytes_per_token']:,.0f}",
                f"{found['cache_bytes']:,}",
                f"{found['cache_copies']:.2f}",
            )
        )
    largest = max(found["difference_of_logits"] for found in contestants.values())
    header = ("", "ms", "CPU ms", *(f"vs {rival}" for rival in RIVALS), "sent", "cache", "copies")
    return (
        f"Decode step, fp32: {case['sequences']} sequences at context {case['context']:,}; {case['layers']} "
        f"layers, hidden {case['hidden_size']}, {case['heads']} query heads, {case['kv_heads']} key-value "
        f"heads of {case['head_dim']}.\n{case['ranks']} ranks: {result['head_groups']} head groups of "
        f"{result['segments']} segments, query layout {result['query_layout']}. Logits equal within "
        f"{largest:.0e} of the largest.\n" + text_table(header, rows)
    )
