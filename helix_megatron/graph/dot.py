"""Write a graph for graphviz, and render it.

Positions are written into the file (`layout=nop2`), so that `dot -Tsvg` draws it as it is meant.
"""

from __future__ import annotations

import html
import shutil
import subprocess
from pathlib import Path

from helix_megatron.errors import HelixError
from helix_megatron.graph.fold import RankClass
from helix_megatron.graph.model import Graph
from helix_megatron.graph.picture import MARGIN, Box, Line, Picture

HEADER = """\
digraph "{name}" {{
  graph [layout=nop2, splines=true, outputorder=edgesfirst, bgcolor=white, bb="0,{bottom:.0f},{right:.0f},0"]
  node [shape=box, style="rounded,filled", fixedsize=true, margin=0, fontname="Helvetica", fontsize=10,
        color="#6b7480", penwidth=0.8]
  edge [color="#7d8794", arrowsize=0.45, penwidth=0.8]
"""
LETTER = 0.55  # width of a letter, in its font's size
TEXT = 'shape=plain, fixedsize=false, style=""'
MISSING = (
    "dot, which draws the pictures, is not installed. Install graphviz (apt-get install graphviz, brew install "
    "graphviz, or conda install graphviz). The .dot and .json files are written without it."
)


def to_dot(graph: Graph, *, detail: str = "modules", fold: bool = True) -> str:
    """The graph in graphviz's language, drawn as `Picture` says."""
    picture = Picture(graph, detail=detail, fold=fold)
    lines = [HEADER.format(name=graph.name, bottom=-picture.bottom, right=picture.right)]
    lines += _headings(graph, picture)
    drawn = {box.name: box for column in picture.columns for box in column}
    lines += [_node(box) for box in drawn.values()]
    for column in range(len(picture.classes)):
        lines += [_edge(line) for line in picture.lines(column)]
    return "\n".join([*lines, "}", ""])


def render(dot_file: Path, kind: str = "svg") -> Path:
    """Draw a .dot file beside it; the path of the picture.

    Raises:
        HelixError: graphviz is not installed, or fails.
    """
    program = shutil.which("dot")
    if program is None:
        raise HelixError(MISSING)
    picture = dot_file.with_suffix(f".{kind}")
    command = [program, f"-T{kind}", str(dot_file), "-o", str(picture)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise HelixError(f"dot could not draw {dot_file}: {run.stderr.strip()[:500]}")
    return picture


def summary(graph: Graph) -> str:
    """The run in one line."""
    s = graph.settings
    model = s["model"]
    kind = f"{model['num_experts']} experts" if model.get("num_experts") else "dense"
    layout = "heads whole"
    if s["segments"] > 1:
        layout = f"m {s['segments']} × n {s['head_groups']}, {s['attention']}"
        layout += f", {s['exchange']}" if s["attention"] == "exact" else ""
    experts = f", EP {s['expert']}" if s["expert"] > 1 else ""
    return (
        f"{model['num_layers']} layers, {kind}, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads, {s['micro_batch_size']} × {s['seq_length']} tokens, "
        f"{s['precision']}; {s['ranks']} ranks, TP {s['tensor']} ({layout}), PP {s['pipeline']}{experts}"
    )


def ranks_text(ranks: list[int]) -> str:
    """`ranks 0-15`, `rank 3`, `ranks 0, 2, 4`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))


# ----------------------------------------------------------------------------- statements


def _headings(graph: Graph, picture: Picture) -> list[str]:
    run, size = summary(graph), 9 if picture.few else 17
    if len(run) * size * LETTER > picture.right:
        run, size = run.replace("; ", ";\n"), min(size, 13)
    title = "<BR/>".join([f"<B>{graph.name}</B>", *map(html.escape, run.split("\n"))])
    place = f'pos="{picture.right / 2:.0f},-24"'
    lines = [f'  "title" [{TEXT}, fontsize={size}, label=<{title}>, {place}]']
    for column, ranks in enumerate(picture.classes):
        label, place = _heading(graph, ranks), f'pos="{picture.middle(column):.0f},-68"'
        lines.append(f'  "h{column}" [{TEXT}, fontsize=12, label=<{label}>, {place}]')
    phases = picture.phases(0) if picture.columns else []
    for index, (box, phase) in enumerate(zip(picture.columns[0], phases, strict=True)):
        if index == 0 or phase != phases[index - 1]:
            place = f'pos="{MARGIN + 40:.0f},{-(box.y - box.height / 2 - 8):.1f}"'
            lines.append(f'  "m{index}" [{TEXT}, fontsize=9, label=<<I>{phase}</I>>, {place}]')
    return lines


def _heading(graph: Graph, ranks: RankClass) -> str:
    text = f"<B>{ranks_text(ranks.ranks)}</B>"
    if len(ranks.ranks) > 1:
        return f"{text}<BR/>{len(ranks.ranks)} of equal structure"
    entry = graph.place[ranks.first]
    if graph.settings["segments"] > 1:
        return f"{text}<BR/>head group {entry['head_group']}, segment {entry['segment']}"
    return f"{text}<BR/>TP {entry['tensor']}, stage {entry['pipeline']}"


def _node(box: Box) -> str:
    small = (f'<FONT POINT-SIZE="9">{html.escape(line)}</FONT>' for line in box.lines[1:])
    label = "<BR/>".join([f"<B>{html.escape(box.lines[0])}</B>", *small])
    where = f'pos="{box.x:.1f},{-box.y:.1f}"'
    where += f", width={box.width / 72:.3f}, height={box.height / 72:.3f}"
    return f'  "{box.name}" [shape={box.shape}, {where}, fillcolor="{box.color}", label=<{label}>]'


def _edge(line: Line) -> str:
    points = " ".join(f"{x:.1f},{-y:.1f}" for x, y in line.points)
    curve = f"e,{line.tip[0]:.1f},{-line.tip[1]:.1f} {points}"
    style = ', color="#c3c9d1"' if line.far else ""
    style += ", style=dotted" if line.saved else ""
    return f'  "{line.source}" -> "{line.target}" [pos="{curve}", tooltip="{line.label}"{style}]'
