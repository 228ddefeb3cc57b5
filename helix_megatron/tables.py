"""Tables of text: for the terminal by rich, and for Markdown. Cells are texts, whatever they look like."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

WIDTH = 10_000  # a terminal wraps what does not fit; a table that goes to a file has no width


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, indent: str = "  "
) -> str:
    """Columns as wide as their widest cell, two spaces between: the first `left` aligned left."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for index, title in enumerate(head):
        table.add_column(Text(title), justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join((indent + line).rstrip() for line in captured.get().splitlines())


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same for a page."""
    lines = [head, ["---"] * len(head), *rows]
    escaped = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped)
