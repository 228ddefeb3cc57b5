"""The pictures of docs/paper.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helix_megatron.core.exchanges import EXACT, AttentionShape
from helix_megatron.core.layout import HeadLayout
from helix_megatron.plan.layouts import Layout, attention_shape
from helix_megatron.plan.memory import training_memory
from helix_megatron.plan.settings import Job, Software
from helix_megatron.training.report_picture import LIGHT, PALETTE, style
from paper import claims as c
from paper import simulated
from paper.curves import KINDS

LINKS = (12.5e9, 25e9, 50e9, 100e9, 200e9, 450e9)  # byte/s of a GPU to the other node
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    # No date, and names that do not depend on the run: the same numbers give the same file.
    figure.savefig(path, metadata={"Date": None})


def draw_all(directory: Path, curves: Sequence[dict[str, Any]]) -> list[str]:
    """Write every picture; their file names."""
    import matplotlib

    settings = style(LIGHT) | {"svg.hashsalt": "helix", "svg.fonttype": "path"}
    pictures = {
        "where.svg": _where,
        "bytes.svg": _bytes,
        "memory.svg": _memory,
        "curves.svg": lambda path: _curves(path, curves),
    }
    with matplotlib.rc_context(settings):
        for name, draw in pictures.items():
            draw(directory / name)
    return list(pictures)


def _where(path: Path) -> None:
    """Tokens/s of m × n against TP 8 × PP 2, over micro-batches in flight and the link between nodes."""
    figure = _figure(10, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (task, title) in zip(panels, simulated.TASKS.items(), strict=True):
        values = [
            [simulated.gain("dense", task, b, simulated.with_network(link)) for b in BATCHES]
            for link in LINKS
        ]
        panel.imshow(values, cmap="RdBu", vmin=0.5, vmax=1.5, origin="lower", aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                text = "–" if math.isnan(value) else f"{value:.2f}"
                weight = "bold" if value > 1 else "normal"
                colour = "white" if abs(value - 1) > 0.33 else LIGHT["text"]
                panel.text(
                    x, y, text, ha="center", va="center", fontsize=8, weight=weight, color=colour
                )
        panel.set_xticks(range(len(BATCHES)), [str(b) for b in BATCHES])
        panel.set_yticks(range(len(LINKS)), [f"{link / 1e9:g}" for link in LINKS])
        panel.grid(visible=False)
        panel.set_xlabel("micro-batches in flight (one sequence of 10000 tokens each)")
        panel.set_title(title, fontsize="medium")
    panels[0].set_ylabel("GB/s of a GPU to the other node")
    figure.suptitle(
        "Simulated: tokens/s of TP 16 = m × n relative to TP 8 × PP 2, dense, two nodes of 8 H100",
        fontsize="medium",
    )
    _save(figure, path)


def _bytes(path: Path) -> None:
    """Bytes that a rank sends per token in one layer's attention, forward, over m."""
    figure = _figure(10, 4)
    panels = figure.subplots(1, 2)
    cases = {
        "the paper's attention on 16 ranks: 16 heads of 512": (16, 16, 512, 16),
        "16 ranks, 32 query heads, 4 key-value heads of 128": (32, 4, 128, 16),
    }
    for panel, (title, (heads, kv_heads, dim, ranks)) in zip(panels, cases.items(), strict=True):
        segments = [m for m in (1, 2, 4, 8, 16) if ranks % m == 0]
        for colour, exchange in zip(PALETTE, EXACT, strict=True):
            points = [(m, _sent(exchange, heads, kv_heads, dim, ranks, m)) for m in segments]
            points = [(m, value) for m, value in points if value is not None]
            if points:
                panel.plot(
                    *zip(*points, strict=True), marker="o", color=colour, label=exchange.name
                )
        if kv_heads < ranks:
            # (h + 2g)·d values of 2 bytes, of which each rank sends its share to all others.
            gathered = (heads + 2 * kv_heads) * dim * 2 * (ranks - 1) / ranks
            panel.axhline(gathered, color=LIGHT["text"], linewidth=1, linestyle=(0, (4, 2.5)))
            panel.annotate(
                "stock Megatron: gathers QKV of all heads",
                (0.02, gathered),
                xycoords=("axes fraction", "data"),
                va="bottom",
                fontsize="small",
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(segments, [str(m) for m in segments])
        panel.set_xlabel("segments m of a head")
        panel.set_title(title, fontsize="medium")
    panels[0].set_ylabel("bytes sent per token and layer, forward")
    panels[0].legend(fontsize="small")
    figure.suptitle(
        "Counted: what a rank sends inside a head group (bf16, one sequence of 10000 tokens per rank of it)",
        fontsize="medium",
    )
    _save(figure, path)


def _sent(exchange: Any, heads: int, kv_heads: int, dim: int, ranks: int, m: int) -> float | None:
    groups = ranks // m
    if m == 1 or kv_heads % groups or heads % groups or dim % (2 * m):
        return None
    sent = []
    # Whole query heads, where there are enough of them.
    for query_layout in ("heads", "segments") if heads // groups % m == 0 else ("segments",):
        layout = HeadLayout(heads, kv_heads, dim, groups, m, query_layout=query_layout)
        shape = AttentionShape(layout, m, c.SEQUENCE, c.SEQUENCE, 2, True, None)
        if not exchange.supports(shape):
            sent.append(exchange.bytes(shape) / (m * c.SEQUENCE))
    return min(sent, default=None)


def _memory(path: Path) -> None:
    """Memory of a GPU over the number of ranks of one replica, training, one sequence a micro-batch."""
    figure = _figure(7, 4)
    panel = figure.subplots()
    model, job, software = simulated.model("dense"), Job("train", c.SEQUENCE, 64), Software()
    ranks = [4, 8, 16, 32, 64, 128]
    cut = [_cut(p) for p in ranks]
    whole = [
        Layout(tp=min(p, c.HEADS), dp=max(1, p // c.HEADS), sequence_parallel=True) for p in ranks
    ]
    curves = {
        "TP = ranks, m = ranks / 16 above 16 heads": cut,
        "TP up to 16 (whole heads), then data parallel": whole,
    }
    for colour, (label, layouts) in zip(PALETTE, curves.items(), strict=False):
        totals = [training_memory(model, layout, job, software).total / 1e9 for layout in layouts]
        panel.plot(ranks, totals, marker="o", color=colour, label=label)
    panel.axhline(80, color=LIGHT["text"], linewidth=1, linestyle=(0, (1, 1.5)))
    panel.annotate("80 GB", (1, 80), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    panel.set_xscale("log", base=2)
    panel.set_ylim(bottom=0)
    panel.set_xticks(ranks, [str(p) for p in ranks])
    panel.set_xlabel("GPUs")
    panel.set_ylabel("GB of a GPU (predicted)")
    panel.set_title("Simulated: training memory, the paper's dense model", fontsize="medium")
    panel.legend(fontsize="small")
    _save(figure, path)


def _cut(ranks: int) -> Layout:
    """Tensor parallel on all ranks, heads cut as far as there are too few, by the exchange that sends least."""
    segments = max(1, ranks // c.HEADS)
    layout = Layout(tp=ranks, segments=segments, sequence_parallel=True)
    if segments == 1:
        return layout
    shape = attention_shape(simulated.model("dense"), layout, c.SEQUENCE, 2)
    fitting = [exchange for exchange in EXACT if not exchange.supports(shape)]
    return layout._replace(exchange=min(fitting, key=lambda e: e.bytes(shape)).name)


def _curves(path: Path, curves: Sequence[dict[str, Any]]) -> None:
    """Mean validation loss over the seeds, with the range of the seeds."""
    figure = _figure(7, 4.4)
    panel = figure.subplots()
    for index, kind in enumerate(KINDS):
        own = [curve["validation"] for curve in curves if curve["name"] == kind.name]
        iterations = [iteration for iteration, _ in own[0]]
        losses = [[run[k][1] for run in own] for k in range(len(iterations))]
        means = [statistics.fmean(of) for of in losses]
        exact = kind.attention == "exact" and kind.segments > 1
        panel.plot(
            iterations,
            means,
            color=PALETTE[index],
            linewidth=4 if index == 0 else 1.6,
            linestyle=(0, (4, 2.5)) if exact else "solid",
            label=kind.name,
        )
        low, high = [min(of) for of in losses], [max(of) for of in losses]
        panel.fill_between(iterations, low, high, color=PALETTE[index], alpha=0.15)
    panel.set_xlabel("iteration")
    panel.set_ylabel("validation loss (nats per token)")
    panel.set_title("Measured: mean and range of three seeds", fontsize="medium")
    panel.legend(fontsize="small")
    _save(figure, path)
