"""How far a conversion is."""

from __future__ import annotations

import time
from typing import Any, TextIO


class Progress:
    """A bar in bytes on a terminal; elsewhere a line now and then.

    Args:
        verb: what is going on.
        total: bytes.
        out: a stream.
    """

    EVERY = 10.0  # seconds between lines

    def __init__(self, verb: str, total: int, out: TextIO) -> None:
        self._verb, self._total, self._out = verb, total, out
        self._done, self._skipped = 0, 0
        self._began = self._said = time.monotonic()
        self._bar: Any = None
        if out.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=verb, total=total, unit="B", unit_scale=True, file=out)

    def add(self, count: int) -> None:
        """`count` bytes more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said > self.EVERY:
            self._said = time.monotonic()
            self._line()

    def skip(self, count: int) -> None:
        """`count` bytes were done by an earlier conversion."""
        self._skipped += count
        self.add(count)

    def close(self) -> None:
        """Everything is done."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = amount((self._done - self._skipped) / seconds)
        share = 100 * self._done / max(self._total, 1)
        print(
            f"{self._verb}: {share:.0f} % of {amount(self._total)}, {rate}/s",
            file=self._out,
            flush=True,
        )


def amount(count: float) -> str:
    """Bytes for people: `1.2 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
