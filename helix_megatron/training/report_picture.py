"""Loss curves of several runs, and below them how far those of one model lie apart."""

from __future__ import annotations

import io
import math
from typing import Any

from helix_megatron.training.report_runs import Comparison

# Okabe and Ito's palette, told apart with any colour vision; its yellow and black vanish on one background.
PALETTE = ("#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2", "#E69F00")

# fp32 training on another layout adds in another order: differences above this are not rounding.
ROUNDING_LINE = 1e-4

LIGHT = {"background": "#ffffff", "text": "#1f2328", "lines": "#d8dee4"}
DARK = {"background": "#161b22", "text": "#e6edf3", "lines": "#30363d"}


def draw_losses(comparison: Comparison, theme: dict[str, str] = LIGHT) -> bytes:
    """The picture as a PNG file's bytes.

    Runs that compute the same thing give one curve: the run compared with is drawn broad, the others dashed
    upon it, so that both show. The lower panel is left out when no runs are compared.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    gaps = {
        label: difference.by_iteration
        for label, difference in comparison.differences.items()
        if difference.by_iteration
    }
    colours = {run.label: PALETTE[k % len(PALETTE)] for k, run in enumerate(comparison.runs)}
    heights = [2.4, 1] if gaps else [1]
    file = io.BytesIO()
    with matplotlib.rc_context(style(theme)):
        # A Figure of its own draws with Agg and leaves pyplot's windows alone.
        figure = Figure(figsize=(8, 5.6 if gaps else 4), dpi=160, layout="constrained")
        panels = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[
            :, 0
        ]
        _draw_curves(panels[0], comparison, colours)
        if gaps:
            _draw_gaps(panels[1], gaps, colours, theme["text"])
        panels[-1].set_xlabel("iteration")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        figure.align_ylabels()
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw_curves(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    for order, run in enumerate(comparison.runs):
        compared = run.label in comparison.differences
        axes.plot(
            list(run.losses),
            list(run.losses.values()),
            color=colours[run.label],
            linewidth=4 if comparison.is_reference(run) else 1.8,
            linestyle=(0, (4, 2.5)) if compared else "solid",
            marker="o" if len(run.losses) == 1 else None,
            zorder=2 + order + (len(comparison.runs) if compared else 0),
            label=_plain(run.label),
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(handlelength=3.5)


def _draw_gaps(axes: Any, gaps: dict[str, Any], colours: dict[str, str], text: str) -> None:
    positive = [gap for by_iteration in gaps.values() for gap in by_iteration.values() if gap > 0]
    finite = [gap for gap in positive if math.isfinite(gap)]
    # Equal losses have no place on a logarithmic axis: they go to the bottom, a decade below the rest.
    bottom = 10.0 ** (math.floor(math.log10(min([*finite, 1e-7]))) - 1)
    for label, by_iteration in gaps.items():
        axes.plot(
            list(by_iteration),
            [max(gap, bottom) if math.isfinite(gap) else math.nan for gap in by_iteration.values()],
            color=colours[label],
            linestyle="none",
            marker=".",
            markersize=5,
        )
    axes.set_yscale("log")
    axes.axhline(ROUNDING_LINE, color=text, linewidth=1, linestyle=(0, (1, 1.5)))
    axes.annotate(
        "fp32 rounding stays below 1e-4",
        (1, ROUNDING_LINE),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 2),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize="small",
    )
    axes.set_ylim(bottom / 2, max([*finite, ROUNDING_LINE]) * 10)
    axes.set_ylabel("|loss difference|\n(nats per token)")
    if len(positive) < sum(map(len, gaps.values())):
        axes.set_title(f"equal losses are drawn at {bottom:.0e}", loc="left", fontsize="small")


def style(theme: dict[str, str]) -> Any:
    text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    background = ("figure.facecolor", "savefig.facecolor", "axes.facecolor")
    return {
        **dict.fromkeys(text, theme["text"]),
        **dict.fromkeys(background, theme["background"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme["lines"]),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    }


def _plain(label: str) -> str:
    """A label without a meaning for matplotlib: dollars start a formula, a leading underscore hides."""
    return label.replace("$", r"\$").lstrip("_")
