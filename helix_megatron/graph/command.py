"""`helix graph`: trace a run, check its operator graph, and write it as data, pictures and a page."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.errors import HelixError
from helix_megatron.flags import OUTPUT_DIRECTORY, add_flags, check_values, setting
from helix_megatron.graph.build import ATTENTION, COMPLETE, MLP
from helix_megatron.outputs import check_free

DESCRIPTION = """\
Draw the operator graph of a training run: every operator, tensor and collective of every rank, with shapes,
traced from the code that runs, at full size, without a GPU and without memory for its tensors. Writes three
graphs, of the whole model and of the attention and the MLP of one layer, as .json, .dot and .svg, and one HTML
page with all three."""
EPILOG = """\
All other flags are those of scripts/pretrain_gpt.py: --preset, model and parallelism. Without any, the graph
is that of --preset paper-dense. The baseline of the paper: --preset paper-dense --tensor-model-parallel-size 8
--pipeline-model-parallel-size 2 --intra-head-parallel-size 1."""
DEFAULT = ("--preset", "paper-dense")
PAGE = "helix_graph.html"
MOST_RANKS, MOST_MICRO_BATCHES = 4096, 4096
MOST_JOBS = 2  # each traces with up to 1.5 GB


@dataclass(frozen=True)
class Options:
    """The flags that are not the training script's."""

    output: str = setting("helix_graph", "the directory that is written", parse=OUTPUT_DIRECTORY)
    overwrite: bool = setting(False, "replace the files of a graph that are in it")
    backward: bool = setting(False, "trace the backward pass, too")
    check: bool = setting(
        False,
        "check the graph and print each check with its figure; the exit status is 1 if one fails",
    )
    micro_batches: int = setting(
        1,
        "micro-batches of the traced step; more than one show how pipeline stages overlap",
        largest=MOST_MICRO_BATCHES,
    )
    balance: float = setting(
        1.1, "what --check allows the busiest rank over the idlest, in FLOPs and bytes", at_least=1
    )
    layer: int = setting(0, "of the two graphs of one layer, counted from 0", at_least=0)
    detail: str = setting(
        "modules",
        "what a box of .dot and .svg is; .json and the page have every operator",
        choices=("modules", "operators"),
    )
    ranks: int | None = setting(
        None,
        "ranks of the run; tensor times pipeline parallel size when not given",
        largest=MOST_RANKS,
    )
    jobs: int | None = setting(
        None, "processes that trace ranks at the same time", largest=MOST_RANKS
    )


def main(argv: Sequence[str] | None = None, program: str = "helix graph") -> int:
    """Trace, check and write as `argv` says; 1 if a check fails, 2 for what the user can put right."""
    parser = Parser(prog=program, description=DESCRIPTION, epilog=EPILOG)
    add_flags(parser, Options)
    with exit_on_error(program):
        args, rest = parser.parse_known_args(argv)
        return _run(Options(**vars(args)), rest, program)
    raise AssertionError("exit_on_error leaves by itself")


def _run(args: Options, rest: list[str], program: str) -> int:
    check_values(args)
    output = Path(args.output)
    names = [name.format(args.layer) for name in (COMPLETE, ATTENTION, MLP)]
    files = [f"{name}.{kind}" for name in names for kind in ("json", "dot", "svg")]
    check_free([output / name for name in (*files, PAGE)], overwrite=args.overwrite)
    from helix_megatron.bench.spawn import ENVIRONMENT, hide_gpus
    from helix_megatron.run.rank_environment import launched_ranks

    if launched_ranks() is not None:
        raise HelixError("helix graph traces all ranks by itself. Run it without torchrun.")
    hide_gpus()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from helix_megatron.graph.flags import parse

    run = parse(rest or DEFAULT, program, args.ranks)
    if args.layer >= run.model.num_layers:
        raise HelixError(
            f"--layer {args.layer}: the model has layers 0 to {run.model.num_layers - 1}. Give one of them."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HelixError(
            f"--output {args.output} cannot be made: {error.strerror}. Give a directory that can be written to."
        ) from error
    jobs = args.jobs or min(os.cpu_count() or 1, MOST_JOBS, run.world_size)
    with _quiet():
        import torch

        torch.set_num_threads(1)
        from helix_megatron.graph.build import attention_view, build, mlp_view

        graph = build(run, backward=args.backward, micro_batches=args.micro_batches, jobs=jobs)
    views = [graph, attention_view(graph, args.layer), mlp_view(graph, args.layer)]
    results: list[Any] = []
    if args.check:
        from helix_megatron.graph.checks import run_checks

        results = run_checks(graph, balance=args.balance)
        print("\n".join(map(str, results)))
    try:
        written = write(views, output, results, detail=args.detail)
    except OSError as error:
        raise HelixError(
            f"--output {args.output} cannot be written to: {error.strerror} ({error.filename}). Give another "
            "directory, or make room."
        ) from error
    print(f"wrote {', '.join(path.name for path in written)} to {args.output}")
    return 0 if all(result.passed for result in results) else 1


def write(
    views: Sequence[Any], directory: Path, checks: Sequence[Any] = (), *, detail: str = "modules"
) -> list[Path]:
    """Write graphs of one run to a directory; the files.

    The first, the whole model, is drawn with equal ranks folded; the others with a column for each rank, up to
    32. Without graphviz there are no pictures, and a line on standard error says what to install.
    """
    from helix_megatron.graph.dot import render, to_dot
    from helix_megatron.graph.html import to_html

    written, missing = [], ""
    for graph in views:
        data, dot = (directory / f"{graph.name}.{kind}" for kind in ("json", "dot"))
        graph.write(data)
        fold = graph is views[0] or len(graph.ranks) > 32
        dot.write_text(to_dot(graph, detail=detail, fold=fold))
        written += [data, dot]
        try:
            written.append(render(dot))
        except HelixError as error:
            missing = str(error)
    page = directory / PAGE
    page.write_text(to_html(views, checks))
    if missing:
        print(missing, file=sys.stderr)
    return [*written, page]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without megatron-core's warnings about packages and GPU settings."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    sys.exit(main())
