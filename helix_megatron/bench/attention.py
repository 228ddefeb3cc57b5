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
    FREE,
    HELIX,
    STOCK,
    STOCK_SDPA,
    Case,
    Measured,
)
from helix_megatron.bench.contest import milliseconds, run_cases, times
from helix_megatron.bench.spawn import SIZE, hide_gpus, require_gpu
from helix_megatron.bench.timing import compare
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import add_flags, one_line, values_of
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
        type=one_line,
        nargs="+",
        metavar="H,G,P,D",
        help="query heads, key-value heads, ranks, dimensions of a head "
        f"(default: {' '.join(DEFAULT_CASES)}; under torchrun those with its number of ranks)",
    )
    add_flags(parser, Case)
    help_text = "timed turns of all layers (default: %(default)s)"
    parser.add_argument("--repeats", type=SIZE, default=21, metavar="N", help=help_text)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="with fewer GPUs than ranks they are shared, and exchanges go over gloo (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        hide_gpus()
    else:
        require_gpu()
    cases = select_cases(args)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"Self-attention layer, forward and backward, {args.device}, {args.dtype}, sequence "
            f"{args.sequence_length}, micro-batch {args.micro_batch_size}; {args.repeats} turns, medians "
            "[quartiles].\n"
        )
    texts: dict[str, Any] = {"summary": summary, "describe": describe, "legend": LEGEND}
    return run_cases(args, cases, _measure, args.repeats, **texts)


def select_cases(args: argparse.Namespace) -> list[Case]:
    """The cases asked for, or the default ones that these ranks can run.

    Raises:
        HelixError: a case that cannot run at all, or not on torchrun's ranks.
    """
    settings = values_of(Case, vars(args))
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
    sent, helix = measured.attention_bytes, measured.samples[HELIX]
    layers = {
        name: times(samples)
        | {
            "attention_bytes": sent[name],
            "attention_bytes_by_formula": formulas.get(name, 0),
            "all_bytes": measured.all_bytes[name],
            "times_helix": compare(samples, helix) | {"attention_bytes": sent[name] / sent[HELIX]},
        }
        for name, samples in measured.samples.items()
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


def describe(result: dict[str, Any]) -> str:
    """The table of one case."""
    case, differences, rows = result["case"], result["difference_from_stock"], []
    for name, layer in result["layers"].items():
        (wall, cpu), ratio = milliseconds(layer), layer["times_helix"]
        pairs = f"{ratio['pairs']:.2f} [{ratio['pairs_low']:.2f}, {ratio['pairs_high']:.2f}]"
        sent = f"{layer['attention_bytes']:,}", f"{ratio['attention_bytes']:.1f}"
        ratios = f"{ratio['medians']:.2f}", pairs, cpu, f"{ratio['cpu']:.2f}"
        rows.append((name, wall, *ratios, *sent, f"{layer['all_bytes']:,}"))
    header = ("", "ms", "/ helix", "in pairs", "CPU ms", "/ helix", "bytes", "/ helix", "with TP's")
    return (
        f"{case['heads']} query heads, {case['kv_heads']} key-value heads of {case['head_dim']}, hidden "
        f"{result['hidden_size']}, {case['ranks']} ranks: {result['head_groups']} head groups of "
        f"{result['segments']} segments, exchange {result['exchange']}.\n"
        f"Equal to stock within {differences[HELIX]:.0e}, {STOCK_SDPA} within "
        f"{differences[STOCK_SDPA]:.0e}: output, gradients of input and weights.\n"
        + text_table(header, rows)
    )
