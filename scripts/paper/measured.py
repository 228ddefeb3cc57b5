"""The paper's comparison measured at a reduced size: `helix bench layouts` on 16 ranks of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

RANKS = 16
# The paper's shape at 1/32 of its width: 4 layers, 16 heads, an MLP four times as wide.
MODEL = (
    *("--num-layers", "4", "--hidden-size", "256", "--num-attention-heads", "16"),
    *("--seq-length", "128", "--micro-batch-size", "1", "--sequence-parallel"),
)
EXPERTS = ("--num-experts", "8", "--moe-router-topk", "2")
KINDS = {
    "dense": (MODEL, ("tp=8,pp=2", "tp=16", "tp=16,m=2", "tp=16,m=4")),
    "moe": (
        MODEL + EXPERTS,
        (
            "tp=8,pp=2,ep=8,etp=1",
            "tp=16,ep=8,etp=1",
            "tp=16,m=2,ep=8,etp=1",
            "tp=16,m=4,ep=8,etp=1",
        ),
    ),
}
IN_FLIGHT = {"dense": (1, 4), "moe": (1,)}


def file_name(kind: str, batches: int) -> str:
    """Where the measurement of a kind of model lies."""
    return f"measured-{kind}-{batches}.json"


def command(kind: str, batches: int, path: Path, rounds: int, iterations: int) -> list[str]:
    """The arguments of `helix bench`."""
    flags, layouts = KINDS[kind]
    arguments = ["layouts", "--ranks", str(RANKS), "--global-batch-size", str(batches), *flags]
    for layout in layouts:
        arguments += ["--layout", layout]
    arguments += ["--rounds", str(rounds), "--iterations", str(iterations), "--json", str(path)]
    return arguments


def formula_bytes(kind: str, batches: int, layout: str) -> float:
    """Bytes per token that a rank should send in attention's exchange, forward and backward, all layers."""
    from helix_megatron.bench.layout_spec import LayoutSpec, validated
    from helix_megatron.core.exchanges import choose
    from helix_megatron.hardware import MACHINES

    common = [*KINDS[kind][0], "--global-batch-size", str(batches)]
    run = validated(LayoutSpec.parse(layout), RANKS, common)
    if not run.helix.active:
        return 0.0
    shape = run.attention_shape
    sent = choose(shape, run.helix.exchange, MACHINES["cpu"]).bytes(shape)
    return 2 * run.model.num_layers * sent / (run.training.micro_batch_size * run.model.seq_length)


def measure(
    directory: Path, rounds: int, iterations: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Write all measurements that a directory lacks."""
    from helix_megatron.bench.__main__ import main

    for kind in KINDS:
        for batches in IN_FLIGHT[kind]:
            path = directory / file_name(kind, batches)
            if path.exists():
                continue
            say(f"measuring: {kind}, {batches} micro-batches in flight, {RANKS} ranks")
            main(command(kind, batches, path, rounds, iterations), "helix bench")
