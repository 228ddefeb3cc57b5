"""`bench layouts`: layouts of a model side by side: throughput, communication, memory.

Each layout trains the same model on the same data with the training script's own code, in turns: all of them,
and all of them again, so that a machine that is slower for a while is so for all. Without --layout it takes
stock Megatron's parallelism of data, tensors, pipeline and context, and Helix at every m. Ranks are processes
of this machine, on its GPUs with NCCL, else on the CPU with gloo.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from helix_megatron.bench.layout_spec import LayoutSpec, rivals, validated
from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.spawn import SIZE
from helix_megatron.errors import HelixError
from helix_megatron.flags import OUTPUT_FILE, one_line, whole
from helix_megatron.outputs import PICTURES, check_file
from helix_megatron.run.config import RunConfig
from helix_megatron.run.rank_environment import MOST_RANKS

NAME = "layouts"
HELP = "throughput, communication and memory of layouts side by side, stock Megatron's among them"
PASSES_FLAGS_ON = True  # to the training script
OWN = ("--train-iters", "--lr-warmup-iters", "--lr-decay-iters")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All other flags are those of scripts/pretrain_gpt.py, for every layout: --preset, model, batch, "
        "precision."
    )
    add = parser.add_argument
    layout = """such as tp=4,m=2 or tp=N/2,pp=2 (N: the ranks); again for another. The first is what
        the others are compared with. Keys: tp, cp, pp, vpp (layers of a virtual stage), m, ep, etp, mb
        (micro-batch), exchange, query, attention, sp and zero1 (on or off)"""
    add("--layout", action="append", type=one_line, metavar="LAYOUT", help=layout)
    ranks = "ranks; with --scaling several: 1,2,4 (default: 4)"
    add("--ranks", type=one_line, default="4", metavar="N", help=ranks)
    scaling = """the layouts at every number of ranks: with the same global batch, or with one that grows with
        the ranks"""
    add("--scaling", choices=("strong", "weak"), help=scaling)
    add("--rounds", type=SIZE, default=3, metavar="R", help="turns of all layouts (default: 3)")
    add("--iterations", type=SIZE, default=6, metavar="I", help="timed in each (default: 6)")
    whole_number = whole(0, 10**6)
    add(
        "--warm-up",
        type=whole_number,
        default=2,
        metavar="W",
        help="iterations before (default: 2)",
    )
    add("--plot", type=OUTPUT_FILE, metavar="PATH", help="draw the results (.png or .svg)")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Measure, print, write; 0."""
    from helix_megatron.bench import layout_report as report

    numbers = _check(args)
    plan = _plan(args, rest, numbers)
    launches = list(itertools.product(range(args.rounds), plan))
    measured: dict[tuple[int, str], list[Any]] = {}
    for done, (_, (ranks, spec, settings)) in enumerate(launches):
        _progress(f"{done + 1}/{len(launches)}: {spec.text} on {ranks} ranks")
        measured.setdefault((ranks, spec.text), []).append(_launch(args, settings, ranks))
    _progress("")
    results = [
        report.Result.of(spec.text, ranks, settings, measured[ranks, spec.text])
        for ranks, spec, settings in plan
    ]
    for ranks in numbers:
        print(report.table_text([result for result in results if result.ranks == ranks]))
    if args.scaling:
        print(report.scaling_text(results, args.scaling))
    print(report.losses_text(results))
    write_json(args.json, args.argv, [asdict(result) for result in results])
    if args.plot is not None:
        report.draw(results, Path(args.plot), scaling=args.scaling)
        print(f"written: {args.plot}")
    return 0


def _check(args: argparse.Namespace) -> list[int]:
    """The numbers of ranks."""
    try:
        numbers = [int(word) for word in args.ranks.split(",")]
    except ValueError:
        numbers = []
    if (
        not numbers
        or len(set(numbers)) < len(numbers)
        or not 1 <= min(numbers) <= max(numbers) <= MOST_RANKS
    ):
        raise HelixError(
            f"--ranks {args.ranks:.60} must be a number from 1 to {MOST_RANKS}, or several such as 1,2,4."
        )
    if len(numbers) > 1 and not args.scaling:
        raise HelixError(f"--ranks {args.ranks}: several numbers need --scaling strong or weak.")
    check_file("plot", args.plot, PICTURES)
    return sorted(numbers)


def _plan(
    args: argparse.Namespace, rest: list[str], numbers: list[int]
) -> list[tuple[int, LayoutSpec, RunConfig]]:
    """(ranks, layout, its run) of everything to be launched."""
    for flag in OWN:
        if any(word.partition("=")[0] == flag for word in rest):
            raise HelixError(
                f"{flag} has no place in a benchmark of layouts, which counts its iterations itself "
                "(--warm-up, --iterations). Leave it out."
            )
    # Half of the timed iterations again, for the time inside collectives.
    iterations = args.warm_up + args.iterations + (args.iterations + 1) // 2
    common = [*rest, "--train-iters", str(iterations), "--lr-warmup-iters", "0"]
    plan = []
    for ranks in numbers:
        flags = [*common, *_batch(args, common, ranks, numbers[0])]
        if args.layout:
            specs = [LayoutSpec.parse(text) for text in dict.fromkeys(args.layout)]
        else:
            specs, others = rivals(ranks, flags)
            for text, reason in others.items():
                print(f"{text} on {ranks} ranks is left out: {reason}", file=sys.stderr)
        plan += [(ranks, spec, validated(spec, ranks, flags)) for spec in specs]
    if not plan:
        raise HelixError("no layout fits. Give one with --layout to see why it does not.")
    return plan


def _batch(args: argparse.Namespace, common: list[str], ranks: int, fewest: int) -> list[str]:
    """The flag of the global batch, where layouts must not choose it themselves."""
    from helix_megatron.training.arguments import parse_args

    script = parse_args(common)
    most = max(map(int, args.ranks.split(",")))
    batch = script["global_batch_size"] or script["micro_batch_size"] * most
    if args.scaling == "weak":
        batch = batch * ranks // fewest
    return ["--global-batch-size", str(batch)]


def _launch(args: argparse.Namespace, settings: RunConfig, ranks: int) -> Any:
    from helix_megatron.bench.layout_ranks import measure_layout
    from helix_megatron.bench.spawn import launch_on_ranks

    return launch_on_ranks(measure_layout, settings, args.warm_up, args.iterations, ranks=ranks)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)
