"""`bench attention`: self-attention of Helix and of stock Megatron, where TP exceeds the key-value heads.

Stock all-gathers the whole QKV projection over the whole tensor parallel group; Helix exchanges among the ranks
of a head group. Both have the same weights and inputs, and their results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import Any

from helix_megatron.bench.attention_case import (
    DEFAULT_CASES,
    ELEMENT_SIZES,
    FREE,
    HELIX,
    STOCK,
    STOCK_SDPA,
    Case,
    Measured,
)
from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.spawn import hide_gpus, require_gpu, run_on_ranks
from helix_megatron.bench.timing import Spread, compare
from helix_megatron.config import EXCHANGES
from helix_megatron.errors import HelixError, listed
from helix_megatron.run.rank_environment import launched_ranks
from helix_megatron.tables import text_table

NAME = "attention"
LEGEND = f"""\
ms: until the last rank is done. in pairs: ratios within a turn. CPU ms: of all ranks together, which other
programs on the machine disturb less. bytes: sent by one rank for attention; with TP's: and for the all-reduces
of tensor parallelism. {STOCK_SDPA}: stock with Helix's attention kernel. {FREE}: Helix with an exchange
that costs nothing (and gives a wrong result); no exchange could be faster."""
HELP = "time and bytes of the attention layer, side by side with stock Megatron's"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="H,G,P,D",
        help="query heads, key-value heads, ranks, dimensions of a head "
        f"(default: {' '.join(DEFAULT_CASES)}; under torchrun those with its number of ranks)",
    )
    parser.add_argument(
        "--sequence-length", type=int, default=512, metavar="S", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch-size", type=int, default=2, metavar="B", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--hidden-size",
        type=int,
        dest="hidden",
        metavar="N",
        help="(default: H·D; models with fewer exist, such as Qwen3-0.6B with half of it)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=21,
        metavar="N",
        help="timed turns of all layers (default: %(default)s)",
    )
    parser.add_argument(
        "--exchange",
        choices=EXCHANGES,
        default="auto",
        help="what Helix exchanges; auto takes the cheapest that fits (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="with fewer GPUs than ranks they are shared, and exchanges go over gloo (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(ELEMENT_SIZES), default="fp32", help="(default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        hide_gpus()
    else:
        require_gpu()
    if args.repeats < 1:
        raise HelixError(f"--repeats {args.repeats} must be at least 1.")
    cases = select_cases(args)
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        print(
            f"Self-attention layer, forward and backward, {args.device}, {args.dtype}, sequence "
            f"{args.sequence_length}, micro-batch {args.micro_batch_size}; {args.repeats} turns, medians "
            "[quartiles]."
        )
    results = []
    for case in cases:
        measured = run_on_ranks(_measure, case, args.repeats, ranks=case.ranks)
        results.append(summary(case, measured))
        if speaks:
            print("\n" + describe(results[-1]), flush=True)
    if speaks:
        print("\n" + LEGEND)
        write_json(args.json, args.argv, results)
    if all(as_predicted(result) for result in results):
        return 0
    if speaks:
        print("The bytes that were sent differ from a formula: one of them is wrong.")
    return 1


def select_cases(args: argparse.Namespace) -> list[Case]:
    """The cases asked for, or the default ones that these ranks can run.

    Raises:
        HelixError: a case that cannot run at all, or not on torchrun's ranks.
    """
    names = ("sequence_length", "micro_batch_size", "exchange", "dtype", "hidden")
    settings = {name: getattr(args, name) for name in names}
    cases = [Case.parse(text, **settings) for text in args.cases or DEFAULT_CASES]
    ranks = launched_ranks()
    if ranks is None:
        return cases
    fitting = [case for case in cases if case.ranks == ranks]
    if not fitting or (args.cases and len(fitting) < len(cases)):
        needed = sorted({case.ranks for case in cases})
        raise HelixError(
            f"torchrun started {ranks} ranks, and the cases need {listed(needed)}. Start as many as the "
            "cases need, give other --cases, or run without torchrun: ranks are then started as needed."
        )
    return fitting


def _measure(case: Case, repeats: int) -> Measured:
    from helix_megatron.bench.attention_ranks import measure_case

    return measure_case(case, repeats)


def summary(case: Case, measured: Measured) -> dict[str, Any]:
    """What is printed and written: of each layer the time and the bytes, and both in multiples of Helix's."""
    formulas = {STOCK: case.stock_bytes, STOCK_SDPA: case.stock_bytes, HELIX: case.helix_bytes}
    helix = measured.samples[HELIX]
    layers = {}
    for name, samples in measured.samples.items():
        sent = measured.attention_bytes[name]
        layers[name] = {
            "wall_seconds": dataclasses.asdict(Spread.of(samples.wall)),
            "cpu_seconds": Spread.of(samples.cpu).median,
            "attention_bytes": sent,
            "attention_bytes_by_formula": formulas.get(name, 0),
            "all_bytes": measured.all_bytes[name],
            "times_helix": {
                **compare(samples, helix),
                "attention_bytes": sent / measured.attention_bytes[HELIX],
            },
        }
    return {
        "case": dataclasses.asdict(case),
        "hidden_size": case.hidden_size,
        "head_groups": case.layout.head_groups,
        "segments": case.layout.segments,
        "exchange": case.chosen.name,
        "difference_from_stock": measured.errors,
        "layers": layers,
    }


def as_predicted(result: dict[str, Any]) -> bool:
    """Whether every layer sent the bytes that its formula says."""
    layers = result["layers"].values()
    return all(layer["attention_bytes"] == layer["attention_bytes_by_formula"] for layer in layers)


def describe(result: dict[str, Any]) -> str:
    """The table of one case."""
    case = result["case"]
    differences = result["difference_from_stock"]
    rows = []
    for name, layer in result["layers"].items():
        wall, ratio = layer["wall_seconds"], layer["times_helix"]
        rows.append(
            (
                name,
                f"{wall['median'] * 1e3:.1f} [{wall['low'] * 1e3:.1f}, {wall['high'] * 1e3:.1f}]",
                f"{ratio['medians']:.2f}",
                f"{ratio['pairs']:.2f} [{ratio['pairs_low']:.2f}, {ratio['pairs_high']:.2f}]",
                f"{layer['cpu_seconds'] * 1e3:.0f}",
                f"{ratio['cpu']:.2f}",
                f"{layer['attention_bytes']:,}",
                f"{ratio['attention_bytes']:.1f}",
                f"{layer['all_bytes']:,}",
            )
        )
    header = ("", "ms", "/ helix", "in pairs", "CPU ms", "/ helix", "bytes", "/ helix", "with TP's")
    return (
        f"{case['heads']} query heads, {case['kv_heads']} key-value heads of {case['head_dim']}, hidden "
        f"{result['hidden_size']}, {case['ranks']} ranks: {result['head_groups']} head groups of "
        f"{result['segments']} segments, exchange {result['exchange']}.\n"
        f"Equal to stock within {differences[HELIX]:.0e}, {STOCK_SDPA} within "
        f"{differences[STOCK_SDPA]:.0e}: output, gradients of input and weights.\n"
        + text_table(header, rows)
    )
