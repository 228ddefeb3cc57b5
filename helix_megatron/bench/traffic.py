"""`bench traffic`: what the exchange of exact attention adds to the traffic of tensor parallelism.

One transformer layer (attention and MLP) runs forward and backward at full size, with fake tensors and a fake
process group: no other process, no memory for its tensors, no GPU. Its collectives are counted and compared
with the formulas; the exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import warnings
from typing import Any, NamedTuple

from helix_megatron.bench.result_file import write_json
from helix_megatron.bench.spawn import RANKS, SIZE, hide_gpus
from helix_megatron.bench.traffic_layer import Layer
from helix_megatron.config import EXCHANGES
from helix_megatron.core.exchanges import EXACT, choose
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import one_line
from helix_megatron.hardware import GPU
from helix_megatron.run.rank_environment import launched_ranks
from helix_megatron.tables import text_table

NAME = "traffic"
HELP = (
    "bytes that exact attention adds to tensor parallelism's, traced at full size without processes"
)


class Row(NamedTuple):
    """An exchange at one micro-batch size: bytes that one rank sends, forward and backward."""

    micro_batch_size: int
    exchange: str
    chosen: bool
    exchange_bytes: int
    exchange_bytes_by_formula: int
    tensor_parallel_bytes: int
    tensor_parallel_bytes_by_formula: int

    @property
    def added(self) -> float:
        """The exchange's bytes relative to those of tensor parallelism."""
        return self.exchange_bytes / self.tensor_parallel_bytes

    @property
    def as_predicted(self) -> bool:
        """Whether every traced rank sent what the formulas say."""
        found = self.exchange_bytes, self.tensor_parallel_bytes
        return found == (self.exchange_bytes_by_formula, self.tensor_parallel_bytes_by_formula)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {
        "--hidden-size": 8192,
        "--num-attention-heads": 16,
        "--ffn-hidden-size": 32768,
        "--tensor-model-parallel-size": 32,
        "--sequence-length": 10000,
    }
    add = parser.add_argument
    number: dict[str, Any] = {"type": SIZE, "metavar": "N"}
    for flag, default in sizes.items():
        kind = RANKS if "parallel" in flag else SIZE
        add(flag, type=kind, metavar="N", default=default, help="(default: %(default)s)")
    add("--num-query-groups", help="key-value heads (default: all heads)", **number)
    segments = "segments of a head (default: the ranks for each key-value head)"
    add("--intra-head-parallel-size", help=segments, **number)
    add("--micro-batch-sizes", nargs="+", default=[1, 2], help="(default: 1 2)", **number)
    parallel = "tensor parallelism with reduce-scatters and all-gathers in place of all-reduces"
    add("--sequence-parallel", action="store_true", help=parallel)
    chosen = "the choice to mark; auto is the fastest by the cost model of a GPU (default: auto)"
    add("--exchange", choices=EXCHANGES, default="auto", help=chosen)
    ranks = "ranks to trace: all, or a list such as 0,31 (default: all)"
    add("--ranks", type=one_line, default="all", metavar="R", help=ranks)


def run(args: argparse.Namespace) -> int:
    hide_gpus()
    if launched_ranks() is not None:
        raise HelixError("traffic traces all ranks in one process. Run it without torchrun.")
    layer = layer_of(args)
    traced_ranks = parse_ranks(args.ranks, layer.ranks)
    rows, unfit = measure_rows(layer, args.micro_batch_sizes, args.exchange, traced_ranks)
    print(describe(layer, rows, unfit, traced_ranks))
    results = {
        "layer": dataclasses.asdict(layer),
        "traced_ranks": traced_ranks,
        "rows": [row._asdict() | {"added": row.added} for row in rows],
        "do_not_fit": [{"micro_batch_size": b, "exchange": e, "reason": r} for b, e, r in unfit],
    }
    write_json(args.json, args.argv, results)
    return 0 if all(row.as_predicted for row in rows) else 1


def layer_of(args: argparse.Namespace) -> Layer:
    """The layer that the flags describe."""
    ranks = args.tensor_model_parallel_size
    kv_heads = args.num_query_groups or args.num_attention_heads
    return Layer(
        hidden_size=args.hidden_size,
        heads=args.num_attention_heads,
        kv_heads=kv_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        ranks=ranks,
        segments=args.intra_head_parallel_size or max(1, ranks // kv_heads),
        sequence_length=args.sequence_length,
        sequence_parallel=args.sequence_parallel,
    )


def parse_ranks(text: str, ranks: int) -> list[int]:
    """`all`, or a list such as `0,31`."""
    if text == "all":
        return list(range(ranks))
    parts = text.split(",")
    if not all(re.fullmatch(r"\d{1,9}", part) and int(part) < ranks for part in parts):
        raise HelixError(
            f"--ranks {text:.200} is not a list of ranks. Valid: all, or numbers from 0 to {ranks - 1} "
            "separated by commas."
        )
    return [int(part) for part in parts]


def measure_rows(
    layer: Layer, batches: list[int], asked: str, traced_ranks: list[int]
) -> tuple[list[Row], list[tuple[int, str, str]]]:
    """What fits, traced; and (micro-batch size, exchange, reason) of what does not."""
    chosen = {b: choose(layer.shape(asked, b), asked, GPU).name for b in batches}
    pairs = itertools.product(batches, EXACT)
    reasons = {(batch, e.name): e.supports(layer.shape(e.name, batch)) for batch, e in pairs}
    fitting = [(exchange, batch) for (batch, exchange), reason in reasons.items() if not reason]
    with warnings.catch_warnings(record=True):  # megatron-core's, of packages and GPU settings
        from helix_megatron.bench.traffic_trace import trace

        by_rank = [trace(layer, fitting, rank) for rank in traced_ranks]
    rows = []
    for (exchange, batch), *traced in zip(fitting, *by_rank, strict=True):
        formula = layer.exchange_bytes(exchange, batch), layer.tensor_parallel_bytes(batch)
        exchanged, others = next((pair for pair in traced if pair != formula), formula)
        sent = exchanged, formula[0], others, formula[1]
        rows.append(Row(batch, exchange, exchange == chosen[batch], *sent))
    rows.sort(key=lambda row: (row.micro_batch_size, row.added))
    return rows, [(*key, reason) for key, reason in reasons.items() if reason]


def describe(
    layer: Layer, rows: list[Row], unfit: list[tuple[int, str, str]], traced_ranks: list[int]
) -> str:
    """The table, why the other exchanges do not fit, and what differs from the formulas."""
    groups = layer.ranks // layer.segments
    own = "reduce-scatters and all-gathers" if layer.sequence_parallel else "all-reduces"
    head = "micro-batch, exchange", "exchange", "by formula", "TP's own", "by formula", "adds", ""
    lines = [
        f"Transformer layer, forward and backward, bf16: hidden {layer.hidden_size}, {layer.heads} query "
        f"heads and {layer.kv_heads} key-value heads of {layer.head_dim}, FFN {layer.ffn_hidden_size}, "
        f"sequence {layer.sequence_length}.",
        f"{layer.ranks} ranks: {groups} head groups of {layer.segments} segments. Bytes that one rank sends, "
        f"traced on {len(traced_ranks)} of them.",
        "",
        text_table(head, map(_cells, rows)),
        "",
        f"TP's own: the {own} of attention and MLP.",
    ]
    lines += [
        f"Not at micro-batch {batches}: {exchange}, {reason}."
        for (exchange, reason), batches in _by_reason(unfit).items()
    ]
    if not all(row.as_predicted for row in rows):
        lines.append("What was traced differs from a formula: one of them is wrong.")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    batch, exchange, chosen, *sent = row
    mark = ("<- chosen" if chosen else "").ljust(9) + ("" if row.as_predicted else " DIFFERS")
    return [f"{batch}  {exchange}", *(f"{size:,}" for size in sent), f"{row.added:.2%}", mark]


def _by_reason(unfit: list[tuple[int, str, str]]) -> dict[tuple[str, str], str]:
    """(exchange, reason) → its micro-batch sizes, as `1, 2`."""
    found: dict[tuple[str, str], list[int]] = {}
    for batch, exchange, reason in unfit:
        found.setdefault((exchange, reason), []).append(batch)
    return {key: listed(batches) for key, batches in found.items()}
