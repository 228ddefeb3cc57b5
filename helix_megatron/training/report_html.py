"""The report as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

import base64
import html

from helix_megatron.training.report_runs import Comparison
from helix_megatron.training.report_table import difference_sentence, settings_rows, table_rows

Rows = list[tuple[str, list[str]]]

EXPLANATION = (
    "Runs that train the same model are compared loss by loss at the same iterations: cutting attention "
    "heads over more ranks must not change what is computed, so the difference may be no more than "
    "rounding. Processes on a CPU machine share its cores, so speeds and communication times measured there "
    "say nothing about GPUs; the bytes sent depend on layout and precision alone."
)

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --back: #f6f8fa; --card: #ffffff;
  --line: #d8dee4; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --soft: #9198a1; --back: #0d1117;
  --card: #161b22; --line: #30363d; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft { color: var(--soft); }
.finding { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem; font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem 1rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; padding: .7rem 1rem; }
th:first-child { text-align: left; font-weight: 400; color: var(--soft); }
img { display: block; width: 100%; height: auto; padding: .75rem; }
details { margin: 2.25rem 0 0; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin: 0 0 .75rem; }
.differs td { font-weight: 600; }
pre { margin: 0; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.5 ui-monospace, monospace; }
"""


def html_report(comparison: Comparison, light_png: bytes, dark_png: bytes, command: str) -> str:
    """The whole page.

    Args:
        comparison: what to show.
        light_png: the picture on a light background.
        dark_png: the same on a dark one.
        command: the command line that made the report.
    """
    findings = "\n".join(
        f'<p class="finding">{_escape(difference_sentence(label, difference))}</p>'
        for label, difference in comparison.differences.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Helix: training runs side by side</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>Helix: training runs side by side</h1>
{findings}
<p class="soft">{_escape(EXPLANATION)}</p>
<h2>Numbers</h2>
{_table(comparison, table_rows(comparison))}
<p class="soft">Speeds and bytes are medians after the first iterations; bytes are those that one rank sends,
per token of the global batch; memory is the largest value seen.</p>
<h2>Losses</h2>
<div class="card">
<picture>
<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(dark_png)}">
<img src="{_data_uri(light_png)}" alt="Loss curves of {_escape(_labels(comparison))}">
</picture>
</div>
<h2>How to reproduce</h2>
<div class="card"><pre>{_escape(_commands(comparison, command))}</pre></div>
<details>
<summary>Settings of each run, bold where they differ</summary>
{_table(comparison, settings_rows(comparison), mark_differences=True)}
</details>
</main>
</body>
</html>
"""


def _table(comparison: Comparison, rows: Rows, mark_differences: bool = False) -> str:
    head = "".join(f'<th scope="col">{_escape(run.label)}</th>' for run in comparison.runs)
    body = "\n".join(
        ('<tr class="differs">' if mark_differences and len(set(cells)) > 1 else "<tr>")
        + f'<th scope="row">{_escape(heading)}</th>'
        + "".join(f"<td>{_escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for heading, cells in rows
    )
    return (
        f'<div class="card"><table>\n<thead><tr><th scope="col"></th>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _commands(comparison: Comparison, report_command: str) -> str:
    commands = {run.label: run.description.get("command") for run in comparison.runs}
    commands["this report"] = report_command
    return "\n\n".join(f"# {label}\n{command}" for label, command in commands.items() if command)


def _labels(comparison: Comparison) -> str:
    return ", ".join(run.label for run in comparison.runs)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
