"""Count the collectives that ran: calls, bytes and, where asked, time, by purpose.

    with measure() as meter:
        loss.backward()
    print(meter.bytes("exchange"))

Purposes are paths such as `exchange/gather-kv`; a query for `exchange` counts everything below it. Collectives
that nobody labelled count under their process group's description.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from helix_megatron.observe import Call, observing

EXCHANGE = "exchange"
"""Root of the purposes of everything that exact attention exchanges inside a head group."""


@dataclass
class Traffic:
    """calls; bytes that this rank sent; seconds until completion (0 unless time was asked for)."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Meter:
    """Observer that adds up traffic by (purpose, collective).

    Args:
        time: also measure seconds. A collective on CPU is then awaited where it is issued, so asynchronous
            ones lose their overlap; on a GPU events on the current stream bracket it.
    """

    def __init__(self, *, time: bool = False) -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self._time = time
        self._pending: list[tuple[Traffic, torch.cuda.Event, torch.cuda.Event]] = []

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        traffic = self.traffic.setdefault((call.purpose, call.collective), Traffic())
        traffic.calls += 1
        traffic.bytes += call.sent_bytes
        if not self._time:
            return run()
        if call.device is not None and call.device.type == "cuda":
            return self._run_on_gpu(traffic, run)
        start = time.perf_counter()
        work = run()
        if work is not None and call.collective not in ("send", "receive"):
            work.wait()
        traffic.seconds += time.perf_counter() - start
        return work

    def _run_on_gpu(self, traffic: Traffic, run: Callable[[], Any]) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work = run()
        if work is not None:
            work.wait()  # the current stream waits; the host does not
        end.record()
        self._pending.append((traffic, begin, end))
        return work

    # ------------------------------------------------------------------- queries

    def calls(self, purpose: str = "") -> int:
        """Number of collectives under a purpose; all of them by default."""
        return sum(traffic.calls for traffic in self._below(purpose))

    def bytes(self, purpose: str = "") -> int:
        """Bytes that this rank sent under a purpose; all of them by default."""
        return sum(traffic.bytes for traffic in self._below(purpose))

    def seconds(self, purpose: str = "") -> float:
        """Seconds spent under a purpose; all of them by default."""
        for traffic, begin, end in self._pending:
            end.synchronize()
            traffic.seconds += begin.elapsed_time(end) / 1e3
        self._pending.clear()
        return sum(traffic.seconds for traffic in self._below(purpose))

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.traffic.clear()
        self._pending.clear()

    def _below(self, purpose: str) -> Iterator[Traffic]:
        for (path, _), traffic in self.traffic.items():
            if not purpose or path == purpose or path.startswith(purpose + "/"):
                yield traffic


@contextlib.contextmanager
def measure(*, time: bool = False) -> Iterator[Meter]:
    """Meter every collective that runs inside the block, in forward and in backward."""
    meter = Meter(time=time)
    with observing(meter):
        yield meter
