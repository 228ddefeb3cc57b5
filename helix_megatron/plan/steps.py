"""What one rank does in a layer: kernels and collectives, with shapes, FLOPs, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.collective_time import Group, collective_seconds
from helix_megatron.plan.roofline import gemm_seconds, stream_seconds

FORWARD, BACKWARD = "forward", "backward"


class Step(NamedTuple):
    """One kernel or collective of one rank.

    kind: gemm, attention, stream (bound by memory), or the name of a collective. flops: executed, a
    multiply-add counts as two. moved: bytes of GPU memory read and written; of a collective, its size as
    nccl-tests counts it. sent: bytes that this rank sends. hidden: the part of `seconds` that runs beside
    other kernels. axis, for collectives: tp, exchange (of core attention), qkv (before it: stock Megatron's
    gather, and statistics of QK norms), cp, ep, pp or dp. sizes: a text, or of a matrix product
    (batch, rows, inner, columns), or of a collective (bytes, ranks).
    """

    name: str
    phase: str
    kind: str
    sizes: str | tuple[float, ...]
    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0
    sent: float = 0.0
    hidden: float = 0.0
    axis: str = ""
    link: str = ""

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden

    @property
    def shape(self) -> str:
        """To read; made only where it is shown, since a search records a hundred thousand steps."""
        if isinstance(self.sizes, str):
            return self.sizes
        if self.kind == "gemm":
            batch, rows, inner, columns = self.sizes
            copies = f"{batch:g} × " if batch != 1 else ""
            return f"{copies}[{rows:.0f}, {inner:.0f}] × [{inner:.0f}, {columns:.0f}]"
        size, ranks = self.sizes
        return f"{size:,.0f} bytes over {ranks}"


class Recorder:
    """Appends steps for one rank; knows chip, cluster and precision, so that callers state sizes only."""

    def __init__(self, cluster: Cluster, precision: str, element: int) -> None:
        self.cluster, self.chip = cluster, cluster.chip
        self.precision, self.element = precision, element
        self.steps: list[Step] = []

    def gemm(
        self,
        name: str,
        rows: float,
        columns: float,
        inner: float,
        *,
        batch: float = 1,
        precision: str | None = None,
        phases: tuple[str, ...] = (FORWARD, BACKWARD),
    ) -> None:
        """A linear layer [rows, inner] × [inner, columns] and the products of its backward pass."""
        precision = precision or self.precision
        if FORWARD in phases:
            self._product(name, FORWARD, rows, columns, inner, batch, precision)
        if BACKWARD in phases:
            self._product(f"{name} wgrad", BACKWARD, columns, inner, rows, batch, precision)
            self._product(f"{name} dgrad", BACKWARD, rows, inner, columns, batch, precision)

    def _product(
        self,
        name: str,
        phase: str,
        rows: float,
        columns: float,
        inner: float,
        batch: float,
        precision: str,
    ) -> None:
        sizes, flops = (batch, rows, inner, columns), 2.0 * batch * rows * columns * inner
        moved = self.element * batch * (rows * inner + inner * columns + rows * columns)
        seconds = gemm_seconds(self.chip, rows, columns, inner, precision, batch)
        self.steps.append(Step(name, phase, "gemm", sizes, flops, moved, seconds))

    def stream(
        self, name: str, elements: float, forward: float, backward: float, shape: str = ""
    ) -> None:
        """A kernel that reads and writes `elements` so many times in each direction."""
        for phase, times in ((FORWARD, forward), (BACKWARD, backward)):
            if times:
                moved = times * elements * self.element
                seconds = stream_seconds(self.chip, moved)
                self.steps.append(Step(name, phase, "stream", shape, 0.0, moved, seconds))

    def attention(
        self, shape: str, flops: float, moved: float, seconds: tuple[float, float], times: float
    ) -> None:
        """Core attention; `times` as many FLOPs are executed backward as forward, and twice the bytes move."""
        for phase, many, read, took in zip(
            (FORWARD, BACKWARD), (1.0, times), (moved, 2 * moved), seconds, strict=True
        ):
            step = Step("core attention", phase, "attention", shape, flops * many, read, took)
            self.steps.append(step)

    def collective(
        self,
        name: str,
        phase: str,
        kind: str,
        size: float,
        group: Group,
        axis: str,
        *,
        beside: float = 0.0,
        sent: float | None = None,
        messages: int = 1,
    ) -> None:
        """A collective over a group; `beside` seconds of kernels run at the same time."""
        if group.ranks == 1 or not size:
            return
        seconds = messages * collective_seconds(self.cluster, kind, size / messages, group)
        sent = sent_bytes(kind, size, group.ranks) if sent is None else sent
        hidden, link, sizes = min(seconds, beside), group.link(self.cluster), (size, group.ranks)
        step = Step(name, phase, kind, sizes, 0.0, size, seconds, sent, hidden, axis, link)
        self.steps.append(step)

    def move_last(self, place: int) -> None:
        """Move the step recorded last to a place before it."""
        self.steps.insert(place, self.steps.pop())


def in_order(steps: Iterable[Step], phase: str) -> list[Step]:
    """The steps of a phase as they run: backward is recorded from the end to the beginning."""
    own = [step for step in steps if step.phase == phase]
    return own if phase == FORWARD else own[::-1]
