"""What the measurements of rivals have in common: their ranks, their cases one by one, times and bytes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.spawn import run_on_ranks
from helix_megatron.bench.timing import Samples, Spread


def run_cases(
    args: argparse.Namespace,
    cases: Sequence[Any],
    measure: Callable[..., Any],
    turns: int,
    *,
    summary: Callable[[Any, Any], dict[str, Any]],
    describe: Callable[[dict[str, Any]], str],
    legend: str,
) -> int:
    """Measure case by case on its ranks, print and write; 1 where the bytes are not those of a formula."""
    speaks = os.environ.get("RANK", "0") == "0"
    results = []
    for case in cases:
        results.append(summary(case, run_on_ranks(measure, case, turns, ranks=case.ranks)))
        if speaks:
            print(describe(results[-1]) + "\n", flush=True)
    right = all(map(as_predicted, results))
    if speaks:
        print(legend)
        write_json(args.json, args.argv, results)
        if not right:
            print("The bytes that were sent differ from a formula: one of them is wrong.")
    return 0 if right else 1


def as_predicted(result: dict[str, Any]) -> bool:
    """Whether every contestant of a summary sent the bytes that its formula says."""
    contestants = result.get("layers") or result["contestants"]
    return all(
        found[name.removesuffix("_by_formula")] == wanted
        for found in contestants.values()
        for name, wanted in found.items()
        if name.endswith("_by_formula")
    )


def times(samples: Samples) -> dict[str, Any]:
    """Seconds of a contestant, for a summary."""
    wall = dataclasses.asdict(Spread.of(samples.wall))
    return {"wall_seconds": wall, "cpu_seconds": Spread.of(samples.cpu).median}


def milliseconds(found: dict[str, Any]) -> tuple[str, str]:
    """The wall and CPU time of a contestant, for a table."""
    wall = {name: f"{seconds * 1e3:.1f}" for name, seconds in found["wall_seconds"].items()}
    text = f"{wall['median']} [{wall['low']}, {wall['high']}]"
    return text, f"{found['cpu_seconds'] * 1e3:.0f}"


def layer_settings(heads: int, kv_heads: int, head_dim: int, ranks: int, **others: Any) -> Any:
    """What one layer of megatron-core is told on a CPU: no biases, no dropout, weights that are set later."""
    off = ("perform_initialization", "masked_softmax_fusion", "gradient_accumulation_fusion")
    return {
        "num_layers": 1,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": head_dim,
        "tensor_model_parallel_size": ranks,
        "use_cpu_initialization": True,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        **dict.fromkeys(off, False),
        **others,
    }


@contextlib.contextmanager
def helix_ranks(ranks: int, segments: int) -> Iterator[None]:
    """megatron-core on CPUs: its process groups, and those of Helix, on a world of so many ranks."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    parallel_state.initialize_model_parallel(ranks, intra_head_parallel_size=segments)
    try:
        seed_model_parallel(1)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        cpu_runtime.uninstall()
