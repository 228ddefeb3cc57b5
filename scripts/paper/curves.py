"""Training curves on real text: an ordinary model, the same model on m ranks, and `segment-local` attention."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.run.config import RunConfig

SEEDS = (1, 2, 3)
ITERATIONS = 300
EVALUATE_EVERY = 50
EARLY = 50
# 4 layers, 4 heads of 32, 307k tokens of the Python language reference.
MODEL = (
    *("--num-layers", "4", "--hidden-size", "128", "--num-attention-heads", "4"),
    *("--seq-length", "128", "--micro-batch-size", "8", "--normalization", "RMSNorm", "--swiglu"),
    *("--lr", "2e-3", "--eval-iters", "16"),
)


@dataclass(frozen=True)
class Kind:
    """A curve: name, segments m on as many ranks, attention."""

    name: str
    segments: int
    attention: str = "exact"

    def flags(self, seed: int, iterations: int) -> list[str]:
        """The training script's flags."""
        flags = [*MODEL, "--train-iters", str(iterations), "--seed", str(seed)]
        flags += ["--lr-warmup-iters", str(iterations // 20)]
        flags += ["--eval-interval", str(min(EVALUATE_EVERY, iterations))]
        size = str(self.segments)
        flags += ["--tensor-model-parallel-size", size, "--intra-head-parallel-size", size]
        return [*flags, "--helix-attention", self.attention]


KINDS = (
    Kind("ordinary, one process", 1),
    Kind("exact, m = 2", 2),
    Kind("exact, m = 4", 4),
    Kind("segment-local, m = 2", 2, "segment-local"),
    Kind("segment-local, m = 4", 4, "segment-local"),
)


def measure(
    iterations: int = ITERATIONS,
    seeds: Sequence[int] = SEEDS,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Train every kind with every seed.

    Returns:
        One entry per run: `name`, `seed`, `loss` of each iteration, and `validation`, pairs of iteration and
        loss; nats per token.
    """
    from helix_megatron.bench.spawn import launch_on_ranks
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.validate import validate

    curves = []
    for seed in seeds:
        for kind in KINDS:
            say(f"training curves: {kind.name}, seed {seed}")
            run = validate(parse_args(kind.flags(seed, iterations)), kind.segments)
            records = launch_on_ranks(_train, run, ranks=kind.segments)
            curves.append({"name": kind.name, "seed": seed} | records)
    return curves


def _train(run: RunConfig) -> dict[str, list[Any]]:
    """On each rank; what rank 0 returns is kept."""
    import contextlib
    import io

    import torch.distributed as dist

    from helix_megatron import parallel_state
    from helix_megatron.megatron.process_group import process_group
    from helix_megatron.training.pretrain import training

    loss: list[float] = []
    validation: list[tuple[int, float]] = []
    with contextlib.redirect_stdout(io.StringIO()), process_group(run.parallel):
        for metrics in training(run):
            loss.append(metrics.lm_loss)
            if metrics.validation_loss is not None:
                validation.append((metrics.iteration, metrics.validation_loss))
        dist.barrier()
        parallel_state.destroy_model_parallel()
    return {"loss": loss, "validation": validation}


@dataclass(frozen=True)
class Summary:
    """Over the seeds, in nats per token.

    mean, deviation: of the last validation loss. differences: that loss minus the ordinary model's with the
    same seed, ascending. early, all: the largest distance of the training loss from the ordinary model's with
    the same seed, over the first `EARLY` iterations and over all.
    """

    name: str
    mean: float
    deviation: float
    differences: tuple[float, ...]
    early: float
    all: float

    @property
    def difference(self) -> float:
        """Mean of the differences."""
        return statistics.fmean(self.differences)


def summaries(curves: Sequence[dict[str, Any]]) -> Iterator[Summary]:
    """One for each kind, in order.

    Raises:
        HelixError: a loss is not finite, or a run is missing.
    """
    runs = {(curve["name"], curve["seed"]): curve for curve in curves}
    seeds = sorted({seed for _, seed in runs})
    for kind in KINDS:
        pairs = []
        for seed in seeds:
            own, ordinary = runs.get((kind.name, seed)), runs.get((KINDS[0].name, seed))
            if own is None or ordinary is None or not all(map(math.isfinite, own["loss"])):
                raise HelixError(
                    f"the stored curve of {kind.name}, seed {seed}, is missing or not finite. Train again."
                )
            pairs.append((own, ordinary))
        last = [own["validation"][-1][1] for own, _ in pairs]
        gaps = [
            [abs(a - b) for a, b in zip(own["loss"], ordinary["loss"], strict=True)]
            for own, ordinary in pairs
        ]
        yield Summary(
            name=kind.name,
            mean=statistics.fmean(last),
            deviation=statistics.stdev(last) if len(last) > 1 else 0.0,
            differences=tuple(
                sorted(own["validation"][-1][1] - base["validation"][-1][1] for own, base in pairs)
            ),
            early=max(max(of[:EARLY]) for of in gaps),
            all=max(max(of) for of in gaps),
        )


def to_json(curves: Sequence[dict[str, Any]]) -> str:
    """One line per run."""
    lines = ",\n".join(json.dumps(curve) for curve in curves)
    return f"[\n{lines}\n]\n"
