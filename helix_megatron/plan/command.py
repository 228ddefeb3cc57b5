"""`helix plan` and `helix simulate`: flags, and what they print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.attention_rates import KERNELS
from helix_megatron.config import HelixConfig
from helix_megatron.core.caches import NAMES as CACHES
from helix_megatron.core.exchanges import EXACT
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.flags import OUTPUT_DIRECTORY, OUTPUT_FILE, OUTPUT_TEXT, real, whole
from helix_megatron.outputs import (
    PICTURES,
    STANDARD_OUTPUT,
    check_file,
    check_free,
    results_alone,
    write_text,
)
from helix_megatron.plan.clusters import CLUSTERS, LOCAL, cluster_of
from helix_megatron.plan.memory import RECOMPUTE
from helix_megatron.plan.models import NAMES, ModelSpec, model_of, model_of_arguments
from helix_megatron.plan.results import SLOWER, Limits, Plan
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import (
    MOST_GPUS,
    MOST_SEQUENCES,
    MOST_TOKENS,
    PRECISIONS,
    TASKS,
    Job,
    Software,
)

DESCRIPTION = """\
Rank every layout of a model on a cluster by predicted time: tensor parallel m × n, context, pipeline, data and
expert parallel, exchange, micro-batch, recomputation. All figures are simulated; docs/planner.md says how well.
A model is a preset, a Hugging Face config.json, or Megatron's model flags given to this command."""
PLAN_FILES = ("plan.md", "plan.json")  # that --write makes
SIMULATE = """\
Print one layout in full, operator by operator, and write a trace of its pipeline for ui.perfetto.dev. The
layout is the fastest that the flags leave; fix all of it with --tensor-model-parallel-size and the others."""


class Size(NamedTuple):
    """A flag that fixes a size of the layout: the field of `Limits`, and whether it divides the GPUs."""

    field: str
    flag: str
    metavar: str
    divides: bool
    help: str


SIZES = (
    Size("tp", "--tensor-model-parallel-size", "P", True, "tensor parallel ranks p = m·n"),
    Size("segments", "--intra-head-parallel-size", "M", True, "segments m of a head"),
    Size("pp", "--pipeline-model-parallel-size", "PP", True, "pipeline stages"),
    Size("first", "--decoder-first-pipeline-num-layers", "L", False, "layers of the first stage"),
    Size("last", "--decoder-last-pipeline-num-layers", "L", False, "layers of the last stage"),
    Size("vp", "--virtual-pipeline-model-parallel-size", "VP", False, "chunks of a stage"),
    Size("cp", "--context-parallel-size", "CP", True, "context parallel ranks"),
    Size("ep", "--expert-model-parallel-size", "EP", True, "ranks for experts"),
    Size("etp", "--expert-tensor-parallel-size", "ETP", True, "ranks for one expert"),
    Size("micro_batch", "--micro-batch", "b", False, "sequences of a micro-batch"),
    Size("max_tp", "--max-tensor-parallel", "P", False, "widest TP (default: four domains)"),
)
# Whose rejections are shown where nothing is left.
EXPLAINED = ("tp", "segments", "pp", "cp", "micro_batch", "exchange")


def build_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that both commands have."""
    parser = Parser(prog=program, description=description)
    add = parser.add_argument
    gpus = whole(largest=MOST_GPUS)
    model = f"a preset ({listed(NAMES)}), a config.json, or Megatron flags in one string"
    add("--model", metavar="MODEL", help=model)
    add("--gpus", type=gpus, required=True, metavar="N", help="GPUs to use, all of them")
    cluster = f"a preset ({listed([*CLUSTERS, LOCAL])}) or a YAML file (default: %(default)s)"
    add("--cluster", default="dgx-h100", metavar="CLUSTER", help=cluster)
    add("--task", choices=TASKS, default="train", help="what is timed (default: %(default)s)")
    length = "tokens of a sequence; for decode, positions in the cache (default: %(default)s)"
    tokens = whole(largest=MOST_TOKENS)
    add("--sequence-length", type=tokens, default=4096, metavar="L", help=length)
    batch = "sequences of a step over all GPUs (default: 4 for each GPU, 1 in inference)"
    sequences = whole(largest=MOST_SEQUENCES)
    add("--global-batch", type=sequences, metavar="B", help=batch)
    served = parser.add_argument_group("with --task serve, in place of length and batch")
    rate = "requests a second over all GPUs (default: as many as the GPUs can serve)"
    served.add_argument("--request-rate", type=real(above=0), metavar="R", help=rate)
    for name, default in (("prompt", 1024), ("output", 256)):
        text = f"tokens of the {name} of a request (default: %(default)s)"
        served.add_argument(
            f"--{name}-tokens", type=tokens, default=default, metavar="T", help=text
        )
    add("--precision", choices=PRECISIONS, help="(default: bf16, fp32 where the chip has no bf16)")
    kernel = "what computes attention; auto is what runs with Transformer Engine and torch (default: auto)"
    add("--kernel", choices=KERNELS, default="auto", help=kernel)
    graphs = "whether layers are replayed from CUDA graphs, without the host (default: in inference alone)"
    add("--cuda-graphs", choices=("on", "off"), help=graphs)
    fixed = parser.add_argument_group("fix a part of the layout")
    for size in SIZES:
        words = {"metavar": size.metavar, "help": size.help}
        fixed.add_argument(size.flag, dest=size.field, type=gpus, **words)  # type: ignore[arg-type]
    on_off = ("on", "off")
    for flag, field, choices, text in (
        ("--sequence-parallel", "sequence_parallel", on_off, "sequence parallelism of norms"),
        ("--helix-exchange", "exchange", [e.name for e in EXACT], "the exchange"),
        ("--helix-query-layout", "query_layout", ("heads", "segments"), "the query layout"),
        ("--recompute-granularity", "recompute", RECOMPUTE, "recomputation"),
        ("--cache", "cache", CACHES, "decode: where a head group keeps keys and values"),
    ):
        fixed.add_argument(flag, dest=field, choices=choices, help=text)
    return parser


def plan_of(args: argparse.Namespace, rest: Sequence[str]) -> Plan:
    """The search that the flags ask for.

    Raises:
        HelixError: flags that do not fit together.
    """
    model = _model(args, rest)
    cluster = cluster_of(args.cluster)
    batch = args.global_batch
    if batch is None:
        batch = args.gpus * (4 if args.task == "train" else 1)
    precision = args.precision
    if precision is None:
        precision = next((p for p in ("bf16", "fp32") if p in cluster.chip.flops), "bf16")
    _check_sizes(args, batch)
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    if limits.sequence_parallel is not None:
        limits = replace(limits, sequence_parallel=args.sequence_parallel == "on")
    if limits.tp is not None and limits.segments is not None:
        HelixConfig(limits.segments).head_groups(limits.tp)
    exchange = next((e for e in EXACT if e.name == limits.exchange), None)
    if exchange is not None and limits.query_layout not in (None, exchange.query_layout):
        valid = listed(e.name for e in EXACT if e.query_layout == limits.query_layout)
        raise HelixError(
            f"--helix-exchange {exchange.name} needs --helix-query-layout {exchange.query_layout}. Valid with "
            f"{limits.query_layout}: {valid}."
        )
    job = Job(args.task, args.sequence_length, batch)
    if args.task == "serve":  # what its layouts are: those of decode, with a sequence for each GPU
        job = Job("decode", args.prompt_tokens + args.output_tokens, args.gpus)
    graphs = None if args.cuda_graphs is None else args.cuda_graphs == "on"
    software = Software(precision=precision, kernel=args.kernel, cuda_graphs=graphs)
    return search(model, args.gpus, cluster, job, software, limits)


def _check_sizes(args: argparse.Namespace, batch: int) -> None:
    """Sizes that no model could make possible."""
    for size in SIZES:
        value = getattr(args, size.field)
        if value is not None and size.divides and args.gpus % value:
            raise HelixError(
                f"{size.flag} {value} does not divide --gpus {args.gpus}. Valid: {listed(divisors(args.gpus))}."
            )
    each = args.micro_batch
    if each is not None and batch % each:
        raise HelixError(
            f"--micro-batch {each} does not divide --global-batch {batch}. Valid: {listed(divisors(batch))}; "
            f"or try --global-batch {-(-batch // each) * each}."
        )


def _model(args: argparse.Namespace, rest: Sequence[str]) -> ModelSpec:
    if args.model is not None and rest:
        raise HelixError(
            f"unknown flag {rest[0]!r}. Model flags are for a model without --model; --help lists the others."
        )
    if args.model is None and not rest:
        raise HelixError(
            f"no model: give --model ({listed(NAMES[:4])}, … or a config.json), or Megatron's model "
            "flags (--num-layers, --hidden-size, --num-attention-heads, …)."
        )
    return model_of(args.model) if args.model is not None else model_of_arguments(rest)


def plan_main(argv: Sequence[str] | None = None, program: str = "helix plan") -> int:
    """Rank layouts; exit status, 2 for what the user can put right."""
    parser = build_parser(program, DESCRIPTION)
    add = parser.add_argument
    rows = "rows of the table (default: %(default)s)"
    add("--rows", type=whole(), default=10, metavar="K", help=rows)
    add("--rejected", action="store_true", help="show every rejected layout with its reason")
    add("--explain", type=whole(), metavar="ROW", help="the arithmetic of a row, term by term")
    add(
        "--json",
        type=OUTPUT_TEXT,
        metavar="PATH",
        help="write everything there; - for standard output",
    )
    add(
        "--plot", type=OUTPUT_FILE, metavar="PATH", help="draw throughput and memory (.png or .svg)"
    )
    written = "write a deployment plan, plan.md and plan.json"
    add("--write", type=OUTPUT_DIRECTORY, metavar="DIR", help=written)
    replaced = "replace the plan.md and plan.json in that directory"
    add("--overwrite", action="store_true", help=replaced)
    row = "the row for the command and --write (default: the one that the verdict speaks for)"
    add("--row", type=whole(), metavar="ROW", help=row)
    with exit_on_error(program):
        args, rest = parser.parse_known_args(argv)
        if args.task == "serve":
            return _serve(args, rest)
        check_file("plot", args.plot, PICTURES)
        check_file("json", args.json)
        if args.write is not None:
            check_free(_plan_files(args.write), overwrite=args.overwrite)
        return _show(plan_of(args, rest), args)
    raise AssertionError("exit_on_error leaves by itself")


def _serve(args: argparse.Namespace, rest: Sequence[str]) -> int:
    from helix_megatron.plan.load import Load
    from helix_megatron.plan.load_report import load_json, print_load, served

    for name in ("plot", "write", "explain"):
        if getattr(args, name) is not None:
            raise HelixError(f"--{name} shows a single step, and --task serve many. Leave it out.")
    check_file("json", args.json)
    plan = plan_of(args, rest)
    rate = args.request_rate or float("inf")
    load = Load(rate, args.prompt_tokens, args.output_tokens)
    found = served(plan, load)
    if args.json is not None:
        write_text(args.json, json.dumps(load_json(plan, load, found), indent=1) + "\n")
    with results_alone(args.json):
        print_load(plan, load, found, args.rows)
    return 0 if found else 1


def _plan_files(directory: str) -> list[Path]:
    return [Path(directory) / name for name in PLAN_FILES]


def _show(plan: Plan, args: argparse.Namespace) -> int:
    from helix_megatron.plan.ranking import plan_json

    if args.json is not None:
        write_text(args.json, json.dumps(plan_json(plan, args.rows), indent=1) + "\n")
        if args.json == STANDARD_OUTPUT and not plan.rows:
            return 1
    with results_alone(args.json):
        return _show_to_people(plan, args)


def _show_to_people(plan: Plan, args: argparse.Namespace) -> int:
    from rich.console import Console

    from helix_megatron.plan.ranking import print_plan

    # Names are texts, whatever they look like.
    console = Console(
        width=None if sys.stdout.isatty() else 160, markup=False, emoji=False, highlight=False
    )
    print_plan(plan, console, count=args.rows, all_rejected=args.rejected)
    if not plan.rows:
        return _nothing(plan, args)
    from helix_megatron.plan.verdict import recommended

    number = recommended(plan) if args.row is None else args.row
    row = _row(plan, number, "--row")
    if args.explain is not None:
        from helix_megatron.plan.explain import explain

        print()
        print(explain(plan, _row(plan, args.explain, "--explain")))
    if args.plot is not None:
        from helix_megatron.plan.plot import plot

        plot(plan, Path(args.plot))
        print(f"\nwritten: {args.plot}")
    if args.write is not None:
        from helix_megatron.plan.deployment import write

        write(plan, row, _plan_files(args.write))
        print("".join(f"written: {path}\n" for path in _plan_files(args.write)), end="")
    print(command_text(plan, row, number))
    return 0


def _nothing(plan: Plan, args: argparse.Namespace) -> int:
    """Nothing is left: because of the flags, which is an error that says why, or because nothing fits."""
    asked = {(field, getattr(args, field)) for field in EXPLAINED}
    causes = [r for r in plan.rejected if r.kind not in SLOWER]
    hits = [(len(asked.intersection(r.sizes)), r) for r in causes]
    most = max((count for count, _ in hits), default=0)
    if plan.everything or most:
        near = [f"{r.what}: {r.reason}" for count, r in hits if count == most][:3]
        raise HelixError(
            f"no layout is what the flags ask for; {len(plan.everything)} others fit. Fix less, or change what "
            f"these name: {'; '.join(near) or 'nothing was rejected'}."
        )
    return 1


def _row(plan: Plan, number: int, flag: str) -> Any:
    if not 1 <= number <= len(plan.rows):
        raise HelixError(f"{flag} {number}: there are rows 1 to {len(plan.rows)}.")
    return plan.rows[number - 1].layout


def command_text(plan: Plan, layout: Any, number: int) -> str:
    """What to paste for a row."""
    from helix_megatron.plan.launch_commands import caveats, deepspeed_config, launch_text

    lines = [f"\nRow {number}:\n", launch_text(plan, layout), ""]
    if plan.job.task == "train":
        config, reason = deepspeed_config(plan, layout)
        text = json.dumps(config) if config else f"not for this row, {reason}."
        lines.append(f"DeepSpeed: {text}")
    return "\n".join([*lines, *caveats(plan, layout)])


def simulate_main(argv: Sequence[str] | None = None, program: str = "helix simulate") -> int:
    """Print one layout in full, and write its trace."""
    parser = build_parser(program, SIMULATE)
    parser.add_argument(
        "--trace",
        type=OUTPUT_TEXT,
        metavar="PATH",
        help="write a Chrome/Perfetto trace; - for standard output",
    )
    with exit_on_error(program):
        args, rest = parser.parse_known_args(argv)
        check_file("trace", args.trace)
        plan = plan_of(args, rest)
        with results_alone(args.trace):
            return _simulate(plan, args)
    raise AssertionError("exit_on_error leaves by itself")


def _simulate(plan: Plan, args: argparse.Namespace) -> int:
    if not plan.rows:
        from helix_megatron.plan.verdict import nothing_fits

        _nothing(plan, args)
        raise HelixError(nothing_fits(plan))
    from helix_megatron.plan.explain import explain
    from helix_megatron.plan.perfetto import pipeline_text, trace_json
    from helix_megatron.plan.ranking import header

    layout = plan.rows[0].layout
    print(header(plan))
    print()
    print(explain(plan, layout))
    print(pipeline_text(plan, layout))
    if args.trace is not None:
        write_text(args.trace, json.dumps(trace_json(plan, layout)))
        if args.trace != STANDARD_OUTPUT:
            print(f"written: {args.trace} (open it at https://ui.perfetto.dev)")
    print(command_text(plan, layout, 1))
    return 0
