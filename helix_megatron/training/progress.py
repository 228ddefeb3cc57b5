"""The live progress line of a training run.

    iteration 12/50 | lm loss 3.2145 | grad norm 1.23 | 10.2k tokens/s | comm 0.0123 ms/token | 412 MiB | ...

On a terminal the line is rewritten in place; in a file or a pipe a line is printed now and then.
"""

from __future__ import annotations

import collections
import contextlib
import os
import statistics
import sys
from typing import TextIO

from helix_megatron import units
from helix_megatron.training.metrics import IterationMetrics

ERASE_LINE = "\r\x1b[K"

# Given up one by one, in this order, when the terminal is too narrow for all.
LEAST_IMPORTANT = ("grad norm", "extra", "eta", "label", "memory", "comm", "speed")


class ProgressLine(contextlib.AbstractContextManager["ProgressLine"]):
    """Shows `IterationMetrics` as they come; a context manager. Open it on one rank.

    Args:
        total_iterations: number of the last iteration.
        log_interval: where nothing can be rewritten, print every so many iterations, and the last.
        label: put in front of the line, for one of several runs.
        stream: where to; standard output when None.
    """

    def __init__(
        self,
        total_iterations: int,
        *,
        log_interval: int = 10,
        label: str = "",
        stream: TextIO | None = None,
    ) -> None:
        self._total = total_iterations
        self._interval = log_interval
        self._label = label
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._line = ""
        # A median, because the first iteration and those that validate or save are slow.
        self._recent_ms: collections.deque[float] = collections.deque(maxlen=25)

    def update(self, metrics: IterationMetrics) -> None:
        self._recent_ms.append(metrics.iteration_ms)
        remaining = self._total - metrics.iteration
        fields = progress_fields(
            metrics, self._total, remaining * statistics.median(self._recent_ms) / 1000
        )
        if self._label:
            fields = {"label": self._label} | fields
        if self._live:
            self._line = fitted(fields, self._columns())
            self._write(ERASE_LINE + self._line)
        elif metrics.iteration % self._interval == 0 or remaining == 0:
            self._write(" | ".join(fields.values()) + "\n")

    def note(self, text: str) -> None:
        """Print a line of its own, such as that a checkpoint was saved, and go on below it."""
        self._write(f"{ERASE_LINE}{text}\n{self._line}" if self._live else f"{text}\n")

    def close(self) -> None:
        """Leave the last state of the line standing."""
        if self._line:
            self._write("\n")
        self._line = ""

    def _columns(self) -> int:
        """Asked for every time: a window can be resized."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        self.close()


def progress_fields(metrics: IterationMetrics, total: int, eta_seconds: float) -> dict[str, str]:
    """The parts of the line by name, in the order in which they are shown."""
    fields = {
        "iteration": f"iteration {metrics.iteration:>{len(str(total))}}/{total}",
        "loss": f"lm loss {metrics.lm_loss:.4f}",
    }
    if metrics.validation_loss is not None:
        fields["validation"] = f"validation loss {metrics.validation_loss:.4f}"
    if metrics.extra_losses:
        fields["extra"] = " | ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.extra_losses.items()
        )
    if metrics.skipped:
        fields["skipped"] = f"step skipped, loss scale {metrics.loss_scale:g}"
    if metrics.grad_norm is not None:
        fields["grad norm"] = f"grad norm {metrics.grad_norm:#.3g}"
    return fields | {
        "speed": f"{units.count(metrics.tokens_per_second)} tokens/s",
        "comm": f"comm {metrics.comm_ms_per_token:#.3g} ms/token",
        "memory": units.size(metrics.memory_bytes),
        "eta": f"eta {units.duration(eta_seconds)}",
    }


def fitted(fields: dict[str, str], columns: int) -> str:
    """The line in fewer than `columns` characters: words and whole parts go first, then its end is cut.

    A line as wide as the terminal would wrap, and a wrapped line cannot be rewritten.
    """
    if len(" | ".join(fields.values())) >= columns:
        fields = fields | {"iteration": fields["iteration"].removeprefix("iteration ")}
    for name in LEAST_IMPORTANT:
        if len(" | ".join(fields.values())) < columns:
            break
        fields = {other: text for other, text in fields.items() if other != name}
    return " | ".join(fields.values())[: max(columns - 1, 0)]
