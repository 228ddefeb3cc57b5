"""What one rank does in a layer: kernels and collectives, with shapes, FLOPs, bytes and seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from helix_megatron.core.exchanges import sent_bytes
from helix_megatron.plan.clusters import Cluster
from helix_megatron.plan.collective_time import Group, collective_seconds
from helix_megatron.plan.layouts import Layout
from helix_megatron.plan.roofline import gemm_seconds, stream_seconds
from helix_megatron.plan.settings import Scenario

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

    def __init__(
        self, cluster: Cluster, precision: str, element: int, *, training: bool = False
    ) -> None:
        self.cluster, self.chip = cluster, cluster.chip if training else cluster.chip.serving
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


class LayerRecorder(Recorder):
    """Records what megatron-core runs in a layer, for one micro-batch on one rank.

    tokens: of the micro-batch on this context parallel rank; own: those that the rank holds outside of
    attention and MLP, where sequence parallelism deals them out.
    """

    def __init__(self, scenario: Scenario, layout: Layout) -> None:
        self.scenario = scenario
        self.model, job, cluster, self.software = scenario
        software, training = self.software, job.task == "train"
        super().__init__(cluster, software.precision, software.element, training=training)
        self.layout = layout
        self.tokens = layout.micro_batch * job.sequence / layout.cp
        self.own = self.tokens / layout.tp if layout.sequence_parallel else self.tokens

    def norm(self, name: str) -> None:
        hidden = self.model.hidden_size
        shape = f"[{self.own:.0f}, {hidden}]"
        self.stream(name, self.own * hidden, 2, 4, shape)
        if self.software.precision == "fp8":  # written once more, and transposed, in one byte each
            self.stream(f"{name} to fp8", self.own * hidden, 0.5, 0.0, shape)

    def residual(self, name: str) -> None:
        """Bias, dropout and residual in one kernel: three tensors, and the mask of a byte per element."""
        hidden, dropout = self.model.hidden_size, self.software.dropout
        times = (3.5, 2.5) if dropout else (3.0, 0.0)
        self.stream(name, self.own * hidden, *times, f"[{self.own:.0f}, {hidden}]")

    def cast(self, name: str, elements: float) -> None:
        """fp8: read in bf16, write it and its transpose; its gradient the same."""
        if self.software.precision == "fp8":
            self.stream(f"{name} to fp8", elements, 2.0, 2.0)

    def column_parallel(self, name: str, rows: float, columns: float, inner: float) -> None:
        """A linear whose input all tensor parallel ranks need: collectives before and beside its products."""
        size, group, start = rows * inner * self.element, self.layout.tp_group, len(self.steps)
        self.gemm(name, rows, columns, inner)
        product, wgrad, dgrad = (step.seconds for step in self.steps[start:])
        if self.software.tp_overlap != "full":
            product = 0.0
        if self.software.tp_overlap == "none":
            wgrad = dgrad = 0.0

        def tp(what: str, phase: str, kind: str, beside: float) -> None:
            self.collective(f"{name} {what}", phase, kind, size, group, "tp", beside=beside)

        if self.layout.sequence_parallel:
            tp("input again", BACKWARD, "all-gather", dgrad)
            tp("gradient", BACKWARD, "reduce-scatter", wgrad)
            if group.ranks > 1:
                self.move_last(start + 2)
            tp("input", FORWARD, "all-gather", product)
        else:
            tp("gradient", BACKWARD, "all-reduce", wgrad)
        if group.ranks > 1:
            self.move_last(start if self.layout.sequence_parallel else start + 2)

    def row_parallel(self, name: str, rows: float, columns: float, inner: float) -> None:
        """A linear whose output is summed over tensor parallel ranks."""
        size, group, start = rows * columns * self.element, self.layout.tp_group, len(self.steps)
        self.gemm(name, rows, columns, inner)
        product, _, dgrad = (step.seconds for step in self.steps[start:])
        if self.software.tp_overlap != "full":
            product = dgrad = 0.0
        parallel = self.layout.sequence_parallel
        kind = "reduce-scatter" if parallel else "all-reduce"
        self.collective(f"{name} output", FORWARD, kind, size, group, "tp", beside=product)
        if parallel:
            name = f"{name} gradient"
            self.collective(name, BACKWARD, "all-gather", size, group, "tp", beside=dgrad)

    def activation(self, elements: float) -> None:
        forward, backward = (3, 5) if self.model.is_gated else (2, 3)
        self.stream("activation", elements, forward, backward)
        self.cast("activation", elements)

    def mlp(self) -> None:
        self.norm("MLP norm")
        self._two_linears("linear_", self.tokens, self.model.ffn / self.layout.tp)
        self.residual("MLP residual")

    def _two_linears(self, name: str, tokens: float, ffn: float) -> None:
        hidden = self.model.hidden_size
        self.column_parallel(f"{name}fc1", tokens, ffn * self.model.fc1_factor, hidden)
        self.activation(tokens * ffn)
        self.row_parallel(f"{name}fc2", tokens, hidden, ffn)

    def experts_mlp(self) -> None:
        """Router, dispatch by all-to-all, experts, and back; balanced routing is assumed."""
        model, layout, hidden = self.model, self.layout, self.model.hidden_size
        self.norm("MLP norm")
        precision = "fp32" if self.software.precision == "fp32" else "bf16"
        self.gemm("router", self.own, model.experts, hidden, precision=precision)
        # How many tokens each expert gets: over tensor parallel ranks for the auxiliary loss, over all of them
        # for the sizes of the all-to-all; whole numbers of 8 bytes.
        counts, ep = 8.0 * model.experts, layout.ep_group
        self.collective("expert loads", FORWARD, "all-reduce", counts, layout.tp_group, "tp")
        self.collective("tokens per expert", FORWARD, "all-gather", layout.ep * counts, ep, "ep")
        copies, width = self.own * model.moe_router_topk, model.expert_width
        if width != hidden:
            self.gemm("latent down", self.own, width, hidden)
        self.stream("permutation", copies * width, 2, 2)
        size, weights = copies * width * self.element, copies * self.element
        gathered, experts_here = copies * layout.etp, model.experts / layout.ep
        expert_group = Group(layout.etp)
        for phase in (FORWARD, BACKWARD):
            # Each token travels with the weight of its expert.
            self.collective("dispatch", phase, "all-to-all", size + weights, ep, "ep")
            kind = "all-gather" if phase == FORWARD else "reduce-scatter"
            gathers = (size + weights) * layout.etp
            self.collective("expert input", phase, kind, gathers, expert_group, "tp")
        rows, ffn = gathered / experts_here, model.moe_ffn / layout.etp
        self.gemm("experts fc1", rows, ffn * model.fc1_factor, width, batch=experts_here)
        self.activation(gathered * ffn)
        self.gemm("experts fc2", rows, width, ffn, batch=experts_here)
        for phase in (FORWARD, BACKWARD):
            kind = "reduce-scatter" if phase == FORWARD else "all-gather"
            self.collective("expert output", phase, kind, size * layout.etp, expert_group, "tp")
            self.collective("combine", phase, "all-to-all", size, ep, "ep")
        self.stream("permutation back", copies * width, 2, 2)
        if width != hidden:
            self.gemm("latent up", self.own, hidden, width)
        if model.shared_ffn:
            tokens = self.own * layout.tp if layout.sequence_parallel else self.own
            self._two_linears("shared ", tokens, model.shared_ffn / layout.tp)
        self.residual("MLP residual")
