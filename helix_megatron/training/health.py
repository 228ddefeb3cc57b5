"""When a run has left the finite numbers, and ends."""

from __future__ import annotations

import math
from collections.abc import Callable

from helix_megatron.errors import DivergenceError
from helix_megatron.run.config import RunConfig
from helix_megatron.training.metrics import IterationMetrics

MOST_SKIPPED = 50  # steps in a row; a dynamic scale finds its place in fewer than 40


class Health:
    """Looks at each iteration of a run, on every rank alike.

    Args:
        run: validated.
        checkpoints: tells in a sentence which checkpoints there are to go back to.
    """

    def __init__(self, run: RunConfig, checkpoints: Callable[[], str]) -> None:
        self._run, self._checkpoints = run, checkpoints
        self._skipped = 0

    def check(self, metrics: IterationMetrics) -> None:
        """Look at one iteration, which is the same on every rank.

        Raises:
            DivergenceError: a loss or norm is not finite although a step was taken with it, or fp16 has taken
                no step for a long time. A skipped step by itself is how a loss scale is found.
        """
        if metrics.skipped:
            self._skipped += 1
            self._check_skipped(metrics)
            return
        self._skipped = 0
        if self._run.training.no_check_for_nan_in_loss_and_grad:
            return
        norm = metrics.grad_norm
        if math.isfinite(metrics.lm_loss) and (norm is None or math.isfinite(norm)):
            return
        raise DivergenceError(
            f"iteration {metrics.iteration} has a loss of {metrics.lm_loss:g} and a gradient norm of "
            f"{'unknown size' if norm is None else f'{norm:g}'}, at a learning rate of "
            f"{metrics.learning_rate:g}. The run ends, because its weights are of no use any more. "
            f"{self._checkpoints()} Lower --lr, warm it up with --lr-warmup-iters, or look at the data; "
            "--no-check-for-nan-in-loss-and-grad goes on all the same."
        )

    def _check_skipped(self, metrics: IterationMetrics) -> None:
        nothing_done = self._skipped == metrics.iteration == self._run.training.train_iters
        if self._skipped < MOST_SKIPPED and not nothing_done:
            return
        fixed = self._run.optimization.loss_scale is not None
        flag = "--loss-scale" if fixed else "--initial-loss-scale"
        raise DivergenceError(
            f"every one of the last {self._skipped} steps, up to iteration {metrics.iteration}, was skipped "
            f"because a gradient overflowed in fp16, at a loss scale of {metrics.loss_scale:g}. The weights "
            f"have not changed in that time. {self._checkpoints()} Lower {flag}, "
            + ("leave it out for a dynamic one, " if fixed else "train for longer, ")
            + "or take --bf16."
        )
