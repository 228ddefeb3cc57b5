"""Throughput and memory over layouts, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.plan.results import Plan
from helix_megatron.plan.verdict import RIVALS, rivals

COLOURS = {
    "Helix (m > 1)": "#d1495b",
    "m = 1": "#8d99ae",
    "TP × PP": "#2e86ab",
    "context parallel": "#3b8e5a",
}
MOST_BARS = 16


def plot(plan: Plan, path: Path) -> None:
    """Left: every layout that fits, memory against tokens per second. Right: the best, with their memory.

    Raises:
        HelixError: the file cannot be written, or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise HelixError("--plot needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (cloud, bars) = plt.subplots(1, 2, figsize=(14, 6), width_ratios=(1, 1.15))
    tokens = plan.job.global_batch * (1 if plan.job.task == "decode" else plan.job.sequence)
    capacity = plan.cluster.chip.memory / 1e9
    for name, wanted in RIVALS.items():
        own = [row for row in plan.everything if wanted(row.layout)]
        if name == "m = 1":
            own = [r for r in own if r.layout.pp == 1 and r.layout.cp == 1]
        if not own:
            continue
        memory, speed = [r.memory / 1e9 for r in own], [tokens / r.seconds for r in own]
        label = f"{name} ({len(own)})"
        cloud.scatter(memory, speed, s=14, alpha=0.6, label=label, color=COLOURS[name])
    cloud.axvline(capacity, color="black", lw=0.8, ls=":")
    where = {"xycoords": ("data", "axes fraction"), "ha": "right"}
    cloud.annotate(f" {capacity:.0f} GB", (capacity, 0.02), fontsize=8, **where)
    cloud.set(xlabel="simulated GB on the fullest GPU", xlim=(0, None), ylim=(0, None))
    cloud.set_ylabel("simulated tokens per second")
    cloud.yaxis.set_major_formatter("{x:,.0f}")
    cloud.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False, fontsize=9)
    cloud.set_title("every layout that fits", loc="left", fontsize=11)
    _bars(plan, bars, tokens)
    for axes in (cloud, bars):
        axes.spines[["top", "right"]].set_visible(False)
    place = f"{plan.gpus} GPUs, {plan.cluster.name}"
    title = f"{plan.model.name} on {place}, {plan.job.task}: simulated"
    figure.suptitle(title, x=0.01, ha="left")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise HelixError(f"cannot write {path}: {error.strerror}.") from error
    finally:
        plt.close(figure)


def _bars(plan: Plan, axes: Any, tokens: float) -> None:
    """The fastest layouts that differ in their degrees of parallelism, and the best of each family."""
    seen, rows = set(), []
    best = list(rivals(plan).values())
    for row in [*best, *plan.rows, *plan.everything]:
        key = row.layout._replace(vp=1).describe()
        if key not in seen:
            seen.add(key)
            rows.append(row)
        if len(rows) == MOST_BARS:
            break
    rows.sort(key=lambda row: -row.seconds)
    labels = [row.layout.describe().replace(" · ", "·") for row in rows]
    families = ("Helix (m > 1)", "context parallel", "TP × PP", "m = 1")
    colours = [COLOURS[next(n for n in families if RIVALS[n](row.layout))] for row in rows]
    speeds = [tokens / row.seconds for row in rows]
    axes.barh(range(len(rows)), speeds, color=colours, height=0.7)
    for place, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        text = f" {speed:,.0f} tokens/s, {row.memory / 1e9:.0f} GB"
        axes.annotate(text, (speed, place), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_xlim(0, 1.35 * max(speeds))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("simulated tokens per second")
    axes.set_title("the best, and the best of each family", loc="left", fontsize=11)
