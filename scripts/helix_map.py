#!/usr/bin/env python3
"""`python scripts/helix_map.py`: write docs/where.md and its pictures: where cutting heads is faster, by model.

One model in four versions that differ in their key-value heads, on one NVLink domain of several sizes, over
context and batch, in training, prefill and decode. A cell compares the fastest layout that cuts heads with the
fastest that does not, each of all layouts that there are, and is left white where the planner's comparisons are
not that good.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.flags import OUTPUT_DIRECTORY
from helix_megatron.outputs import write_text
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.evidence import band
from helix_megatron.plan.models import ModelSpec, model_of
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Software
from helix_megatron.tables import markdown_table
from helix_megatron.training.report_picture import LIGHT, style

PROGRAM = "python scripts/helix_map.py"
GROUPS = (1, 2, 4, 8)  # key-value heads
DOMAINS = (8, 16, 32)  # GPUs, all of one NVLink domain
KIB = 1024
CONTEXTS = {
    "decode": (8 * KIB, 32 * KIB, 128 * KIB, 512 * KIB),
    "prefill": (8 * KIB, 32 * KIB, 128 * KIB),
    "train": (4 * KIB, 16 * KIB, 64 * KIB),
}
BATCHES = {"decode": (1, 4, 16, 64), "prefill": (1, 8, 64), "train": (8, 64, 256)}
TITLES = {"decode": "decode", "prefill": "prefill", "train": "training"}


class Cell(NamedTuple):
    """gain: speed of the fastest layout that cuts heads relative to the fastest that does not, less 1; None
    where one does not fit. margin: how well the planner tells such layouts apart."""

    gain: float | None
    margin: float
    cut: str
    whole: str

    @property
    def told_apart(self) -> bool:
        return self.gain is not None and abs(self.gain) > self.margin

    @property
    def text(self) -> str:
        if self.gain is None:
            return "only cut" if self.cut else "–"
        return f"{100 * self.gain:+.0f}" if self.told_apart else "·"


def model(groups: int) -> ModelSpec:
    """Llama 3 8B's layers with 32 query heads and so many key-value heads."""
    base = model_of("llama-3-8b")
    return dataclasses.replace(base, num_query_groups=groups, name=f"32 / {groups} heads")


def cell(groups: int, domain: int, task: str, context: int, batch: int) -> Cell:
    """One comparison, on all GPUs of a domain of H100 with NVLink 4."""
    cluster = dataclasses.replace(CLUSTERS["dgx-h100"], name=f"nvlink-{domain}", domain=domain)
    plan = search(model(groups), domain, cluster, Job(task, context, batch), Software())
    cut = plan.best(lambda layout: layout.segments > 1)
    whole = plan.best(lambda layout: layout.segments == 1)
    names = [row.layout.describe() if row else "" for row in (cut, whole)]
    if cut is None or whole is None:
        return Cell(None, 0.0, *names)
    margin = max(band(plan.scenario, row.layout).apart for row in (cut, whole))
    return Cell(whole.seconds / cut.seconds - 1, margin, *names)


Cells = dict[tuple[int, int, str, int, int], Cell]


def all_cells() -> Cells:
    """Every comparison, by key-value heads, domain, task, context and batch."""
    keys = [
        (groups, domain, task, context, batch)
        for groups in GROUPS
        for domain in DOMAINS
        for task, contexts in CONTEXTS.items()
        for context in contexts
        for batch in BATCHES[task]
    ]
    return {key: cell(*key) for key in keys}


def draw(cells: Cells, task: str, path: Path) -> None:
    """A panel for each number of key-value heads and each domain: context by batch."""
    import matplotlib
    from matplotlib.figure import Figure

    contexts, batches = CONTEXTS[task], BATCHES[task]
    settings = style(LIGHT) | {"svg.hashsalt": "helix", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure = Figure(
            figsize=(2.7 * len(GROUPS) + 1, 2.1 * len(DOMAINS) + 0.6), layout="constrained"
        )
        panels = figure.subplots(len(DOMAINS), len(GROUPS), sharex=True, sharey=True)
        for down, domain in enumerate(DOMAINS):
            for right, groups in enumerate(GROUPS):
                found = [[cells[groups, domain, task, c, b] for c in contexts] for b in batches]
                _panel(panels[down][right], found, contexts, batches)
                if down == 0:
                    panels[down][right].set_title(f"{groups} key-value head{'s' * (groups > 1)}")
                if right == 0:
                    panels[down][right].set_ylabel(f"{domain} GPUs\nbatch")
        figure.supxlabel("context, tokens")
        figure.suptitle(f"{TITLES[task]}: % faster with cut heads (simulated)")
        figure.savefig(path, metadata={"Date": None})


def _panel(
    panel: Any, found: list[list[Cell]], contexts: Sequence[int], batches: Sequence[int]
) -> None:
    shown = [
        [c.gain if c.told_apart else (0.5 if c.text == "only cut" else 0.0) for c in row]
        for row in found
    ]
    panel.imshow(shown, cmap="RdBu", vmin=-0.5, vmax=0.5, origin="lower", aspect="auto")
    panel.grid(visible=False)
    panel.set_xticks(range(len(contexts)), [f"{c // KIB}K" for c in contexts])
    panel.set_yticks(range(len(batches)), [str(b) for b in batches])
    for y, row in enumerate(found):
        for x, one in enumerate(row):
            dark = abs(shown[y][x] or 0) > 0.35
            colour = "white" if dark else "black"
            panel.text(x, y, one.text, ha="center", va="center", fontsize=7, color=colour)


def page(cells: Cells) -> str:
    """The page: what it shows, what follows, pictures, and the strongest cells."""
    lines = [
        "# Where cutting heads is faster",
        "",
        "You can read here for which models, GPUs and jobs Helix is worth trying, by simulation. "
        f"Generated by `{PROGRAM}`; do not edit.",
        "",
        "The model is Llama 3 8B with 32 query heads of 128 dimensions and 1, 2, 4 or 8 key-value heads, in "
        "bf16, on all GPUs of one NVLink domain of H100. Each cell compares the fastest layout that cuts heads "
        "with the fastest that does not, whatever they are: replicas, tensor, context and pipeline parallelism "
        "are all allowed. `·` is a difference that the [planner](planner.md#accuracy) cannot tell from none, "
        "`only cut` a job that fits with cut heads alone, `–` one that fits neither way. `helix serve` has "
        "neither pipeline nor context parallelism: there the rivals are fewer. Decode and prefill are timed as "
        "replayed from CUDA graphs; `helix serve` launches operators one by one, and where its host is slower "
        "than the GPU, differences are smaller (`helix plan --cuda-graphs off`).",
        "",
        *_claims(cells),
        "",
        *_least(cells),
        "",
    ]
    for task, title in TITLES.items():
        lines += [
            f"## {title.capitalize()}",
            "",
            f"![{title}](where/{task}.svg)",
            "",
            _table(cells, task),
            "",
        ]
    wrapped = (line if line.startswith(("|", "!")) else textwrap.fill(line, 120) for line in lines)
    return "\n".join(wrapped)


def _count(cells: Cells, task: str, fits: Any = lambda key: True) -> tuple[int, int, int, int]:
    """(cells that both fit, faster with cut heads, slower, only with cut heads)."""
    own = [(key, one) for key, one in cells.items() if key[2] == task and fits(key)]
    both = [one for _, one in own if one.gain is not None]
    faster = sum(one.told_apart and (one.gain or 0) > 0 for one in both)
    slower = sum(one.told_apart and (one.gain or 0) < 0 for one in both)
    return len(both), faster, slower, sum(one.text == "only cut" for _, one in own)


def _claims(cells: Cells) -> list[str]:
    """A sentence for each task, counted from the cells."""
    found = []
    for task, title in TITLES.items():
        both, faster, slower, alone = _count(cells, task)
        few = _count(cells, task, lambda key: key[0] < key[1] and key[4] == BATCHES[key[2]][0])
        even = both - faster - slower
        found.append(
            f"- **{title.capitalize()}**: of {both} jobs that run either way, cut heads are faster in "
            f"{faster}, slower in {slower}, and not told apart in {even}; {alone} more fit with cut heads "
            f"only. With the smallest batch and more GPUs than key-value heads: faster in {few[1]} of {few[0]}."
        )
    return found


def _least(cells: Cells) -> list[str]:
    """From how long a cache on cut heads are faster in decode, by key-value heads."""
    least: dict[int, int] = {}
    for (groups, _, task, context, batch), one in cells.items():
        if task == "decode" and one.told_apart and (one.gain or 0) > 0:
            least[groups] = min(least.get(groups, context * batch), context * batch)
    parts = [f"{tokens // KIB}K with {groups}" for groups, tokens in sorted(least.items())]
    if not parts:
        return []
    text = "Positions in all caches from which on decode is faster with cut heads somewhere, by key-value "
    text += "heads: "
    return [text + ", ".join(parts) + "."]


def _table(cells: Cells, task: str) -> str:
    """The cells with the largest gains that are told apart, and what the layouts are."""
    own = [(key, one) for key, one in cells.items() if key[2] == task and one.told_apart]
    own.sort(key=lambda pair: -(pair[1].gain or 0))
    shown = [(k, c) for k, c in own if (c.gain or 0) > 0][:6]
    if not shown:
        return "There is no cell in which cut heads are faster by more than the planner can tell."
    head = ("key-value heads", "GPUs", "context", "batch", "faster", "cut heads", "whole heads")
    rows = [
        (
            str(k[0]),
            str(k[1]),
            f"{k[3] // KIB}K",
            str(k[4]),
            f"{100 * (c.gain or 0):.0f}%",
            c.cut,
            c.whole,
        )
        for k, c in shown
    ]
    return markdown_table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures."""
    what = "Write docs/where.md and its pictures: where cutting heads is faster, by simulation."
    parser = Parser(prog=PROGRAM, description=what)
    parser.add_argument(
        "--out", type=OUTPUT_DIRECTORY, default="docs", help="(default: %(default)s)"
    )
    with exit_on_error(PROGRAM):
        args = parser.parse_args(argv)
        directory = Path(args.out)
        (directory / "where").mkdir(parents=True, exist_ok=True)
        cells = all_cells()
        for task in TITLES:
            draw(cells, task, directory / "where" / f"{task}.svg")
        write_text(directory / "where.md", page(cells))
        print(f"written: {directory / 'where.md'}")
        return 0
    raise AssertionError("exit_on_error leaves by itself")


if __name__ == "__main__":
    sys.exit(main())
