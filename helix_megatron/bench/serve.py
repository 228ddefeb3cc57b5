"""`bench serve`: time to the first token and per token of servers under a Poisson load, in one run.

OpenAI's client streams the same requests from each server, one server after the other: this one, this one
computing every prompt whole, and transformers' own. The exit status is 1 if this server's two texts differ.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.serve_load import Load, Workload, percentile, send
from helix_megatron.bench.serve_servers import (
    HELIX,
    SERVERS,
    WHOLE_PROMPTS,
    command,
    model_name,
    running,
    write_model,
)
from helix_megatron.bench.spawn import RANKS, SIZE
from helix_megatron.errors import HelixError
from helix_megatron.flags import INPUT_DIRECTORY, OUTPUT_FILE, real, whole
from helix_megatron.outputs import check_file
from helix_megatron.run.local_ranks import reserved_port
from helix_megatron.tables import text_table

NAME = "serve"
HELP = "time to the first token and per token of servers under a Poisson load"
PERCENTILES = (50, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def number(flag: str, default: float, text: str, kind: Any = SIZE) -> None:
        help_text = f"{text} (default: %(default)s)"
        parser.add_argument(flag, type=kind, default=default, help=help_text)

    text = "a Hugging Face model with a tokenizer (default: a random Llama)"
    parser.add_argument("--load", type=INPUT_DIRECTORY, help=text)
    number("--size", 256, "hidden size of the random model, a multiple of 64")
    number("--nproc-per-node", 1, "ranks of this server", RANKS)
    number("--requests", 64, "how many requests are sent")
    number("--rate", 4.0, "requests a second on average; 0 sends all at once", real())
    number("--prompt-tokens", 256, "tokens of a prompt")
    number("--common-tokens", 0, "how many of them are the same in all prompts", whole(0))
    number("--max-tokens", 32, "tokens to generate for a request")
    number("--seed", 1, "of prompts and arrivals", whole(0))
    text = "which servers are measured (default: all)"
    parser.add_argument("--server", choices=SERVERS, nargs="+", default=SERVERS, help=text)
    text = "draw the distributions of both times there"
    parser.add_argument("--plot", type=OUTPUT_FILE, metavar="PATH", help=text)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write what was asked for; the exit status."""
    check_file("plot", args.plot)
    names = ("requests", "rate", "prompt_tokens", "common_tokens", "max_tokens", "seed")
    workload = Workload(**{name: getattr(args, name) for name in names})
    loads: dict[str, Load] = {}
    with tempfile.TemporaryDirectory(prefix="helix-bench-") as folder:
        model = Path(args.load or folder, "" if args.load else "model")
        if not args.load:
            write_model(model, args.prompt_tokens + args.max_tokens, args.size)
        for server in args.server:
            log = Path(folder, f"{SERVERS.index(server)}.log")
            try:
                with reserved_port() as port:
                    arguments = command(server, model, port, args.nproc_per_node)
                    with running(arguments, port, log) as url:
                        loads[server] = send(workload, url, model_name(server, model))
            except HelixError:
                print(_table(loads))  # what the others took minutes for
                raise
    print(_table(loads))
    equal = _texts_are_equal(loads)
    if equal is not None:
        print(f"Texts with and without prefix caching: {'equal' if equal else 'NOT equal'}.")
    if args.plot:
        _plot(loads, workload, Path(args.plot))
    write_json(args.json, args.argv, {name: _record(load) for name, load in loads.items()})
    return int(equal is False)


def _texts_are_equal(loads: Mapping[str, Load]) -> bool | None:
    """Of this server with and without prefix caching; None where only one of them ran."""
    pair = [
        [answer.text for answer in loads[name].answers]
        for name in (HELIX, WHOLE_PROMPTS)
        if name in loads
    ]
    return pair[0] == pair[1] if len(pair) == 2 else None


def _table(loads: Mapping[str, Load]) -> str:
    titles = [f"{what} p{p}, ms" for what in ("first", "each") for p in PERCENTILES]
    rows = []
    for name, load in loads.items():
        times = [
            f"{percentile(values, p) * 1e3:,.1f}" if values else "-"
            for values in (load.firsts(), load.eaches())
            for p in PERCENTILES
        ]
        rate = f"{load.tokens / load.seconds:,.1f}"
        rows.append((name, *times, rate, f"{load.seconds:,.1f}"))
    return text_table(("server", *titles, "tokens/s", "seconds"), rows)


def _record(load: Load) -> dict[str, Any]:
    return {
        "seconds": load.seconds,
        "tokens": load.tokens,
        "first_token_seconds": load.firsts(),
        "output_token_seconds": load.eaches(),
    }


def _plot(loads: Mapping[str, Load], workload: Workload, path: Path) -> None:
    """How many of the requests had to wait at most so long."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    titles = "time to the first token, ms", "time per further token, ms"
    for axes, title, kind in zip(both, titles, (Load.firsts, Load.eaches), strict=True):
        for name, load in loads.items():
            values = sorted(1e3 * value for value in kind(load))
            shares = [100 * (place + 1) / len(values) for place in range(len(values))]
            axes.step(values, shares, where="post", label=name)
        axes.set(xlabel=title, xscale="log", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("% of requests")
    both[0].legend(frameon=False, fontsize=9, loc="upper left")
    rate = f"{workload.rate:g} a second" if workload.rate else "all at once"
    figure.suptitle(
        f"{workload.requests} requests, {rate}; {workload.prompt_tokens} tokens of prompt, "
        f"{workload.common_tokens} of them common, {workload.max_tokens} generated",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
