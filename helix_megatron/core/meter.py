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
from typing import Any, Literal

import torch

from helix_megatron.core.observe import Call, observing

EXCHANGE = "exchange"
"""Root of the purposes of everything that exact attention exchanges inside a head group."""


@dataclass
class Traffic:
    """calls; bytes that this rank sent; seconds until completion (0 unless time was asked for)."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


Timing = Literal["off", "total", "exposed"]


class Meter:
    """Observer that adds up traffic by (purpose, collective).

    Args:
        timing: which seconds to measure besides.

            `total`: from the start of a collective to its completion. One on the CPU is awaited where it is
            issued, so that asynchronous ones lose their overlap; on a GPU events on the current stream
            bracket it.

            `exposed`: while this rank's computation stands still: in the call itself and in waiting for it.
            Overlap stays. Where ranks arrive at different times, as pipeline stages do, waiting for the
            others is part of it.

    `timing` may be changed between collectives.
    """

    def __init__(self, timing: Timing = "off") -> None:
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.timing = timing
        self._pending: list[tuple[Traffic, torch.cuda.Event, torch.cuda.Event]] = []

    def around(self, call: Call, run: Callable[[], Any]) -> Any:
        traffic = self.traffic.setdefault((call.purpose, call.collective), Traffic())
        traffic.calls += 1
        traffic.bytes += call.sent_bytes
        if self.timing == "off":
            return run()
        on_gpu = call.device is not None and call.device.type == "cuda"
        if self.timing == "exposed":
            # A synchronous one may run on the current stream already when it is issued.
            work = self._timed(traffic, run, on_gpu)
            return None if work is None else _Awaited(work, self, traffic, on_gpu)
        return self._timed(traffic, lambda: _completed(call, run(), on_gpu), on_gpu)

    def _timed(self, traffic: Traffic, run: Callable[[], Any], on_gpu: bool) -> Any:
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = run()
            end.record()
            self._pending.append((traffic, begin, end))
            return result
        start = time.perf_counter()
        result = run()
        traffic.seconds += time.perf_counter() - start
        return result

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


def _completed(call: Call, work: Any, on_gpu: bool) -> Any:
    """The work, done; on a GPU the current stream waits for it, and the host does not."""
    # A send or receive may be completed by one that follows.
    if work is not None and (on_gpu or call.collective not in ("send", "receive")):
        work.wait()
    return work


class _Awaited:
    """A `torch.distributed.Work` whose waiting is timed."""

    def __init__(self, work: Any, meter: Meter, traffic: Traffic, on_gpu: bool) -> None:
        self._work, self._meter, self._traffic, self._on_gpu = work, meter, traffic, on_gpu

    def wait(self, *args: Any) -> Any:
        return self._meter._timed(self._traffic, lambda: self._work.wait(*args), self._on_gpu)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def measure(timing: Timing = "off") -> Iterator[Meter]:
    """Meter every collective that runs inside the block, in forward and in backward."""
    meter = Meter(timing)
    with observing(meter):
        yield meter
