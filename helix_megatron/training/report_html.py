"""The report as one HTML file that needs nothing else: no network, no script, no second file."""

from __future__ import annotations

import base64
from importlib import resources

from helix_megatron.training.report_runs import Comparison
from helix_megatron.training.report_table import difference_sentence, settings_rows, table_rows


def html_report(comparison: Comparison, light_png: bytes, dark_png: bytes, command: str) -> str:
    """The whole page: `report.html.jinja`, filled in."""
    import jinja2

    commands = {run.label: run.description.get("command") for run in comparison.runs}
    commands["this report"] = command
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    page = resources.files("helix_megatron.training").joinpath("report.html.jinja").read_text()
    return environment.from_string(page).render(
        labels=[run.label for run in comparison.runs],
        findings=[difference_sentence(*found) for found in comparison.differences.items()],
        numbers=table_rows(comparison),
        settings=settings_rows(comparison),
        light_png=base64.b64encode(light_png).decode(),
        dark_png=base64.b64encode(dark_png).decode(),
        commands="\n\n".join(f"# {label}\n{text}" for label, text in commands.items() if text),
    )
