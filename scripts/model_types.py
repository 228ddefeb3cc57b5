"""The table of model types in docs/conversion.md, made from what the package declares.

python scripts/model_types.py          writes it

tests/model/test_model_types.py compares it with the page, and every cell with the tests that show it.
"""

from __future__ import annotations

from pathlib import Path

from helix_megatron.huggingface.forms import SHOWN
from helix_megatron.model.families import CUTTABLE, FAMILIES, INEXPRESSIBLE, READ_AS
from helix_megatron.plan.outlines import OUTLINES
from helix_megatron.tables import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "conversion.md"
BEGIN, END = "<!-- made by scripts/model_types.py -->", "<!-- end -->"
HEADER = (
    "model type",
    "cut in place",
    "convert",
    "generate, serve",
    "plan",
    "what conversion lacks",
)


def rows() -> list[tuple[str, ...]]:
    """A row for each model type, as `HEADER` names its cells."""
    return [
        (
            f"`{shown}`",
            "query heads whole or cut"
            if name in CUTTABLE
            else "whole query heads"
            if name in SHOWN
            else "no",
            "yes" if name in FAMILIES else "no",
            "megatron-core"
            if name in FAMILIES and FAMILIES[name].runs_in_engine
            else "transformers"
            if name in SHOWN
            else "no",
            "yes" if name in FAMILIES or name in OUTLINES else "no",
            INEXPRESSIBLE.get(name, ""),
        )
        for shown in sorted({*CUTTABLE, *SHOWN, *FAMILIES, *READ_AS})
        for name in (READ_AS.get(shown, shown),)
    ]


def page() -> str:
    """The page with the table of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table(HEADER, rows())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
