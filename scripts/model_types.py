"""The table of model types in docs/conversion.md, made from what the package declares.

python scripts/model_types.py          writes it

tests/model/test_model_types.py compares it with the page, and every cell with the tests that show it.
"""

from __future__ import annotations

from pathlib import Path

from helix_megatron.errors import HelixError
from helix_megatron.huggingface.forms import SHOWN
from helix_megatron.inference.model_flags import check_attention
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families import CUTTABLE, FAMILIES, INEXPRESSIBLE
from helix_megatron.tables import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "conversion.md"
BEGIN, END = "<!-- made by scripts/model_types.py -->", "<!-- end -->"
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "num_attention_heads": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 512,
    "n_layer": 4,
    "n_embd": 512,
    "n_head": 8,
}
HEADER = ("model type", "cut in place", "convert", "generate, serve", "plan", "what is in the way")


def rows() -> list[tuple[str, ...]]:
    """A row for each model type, as `HEADER` names its cells."""
    return [
        (
            f"`{name}`",
            "query heads whole or cut"
            if name in CUTTABLE
            else "whole query heads"
            if name in SHOWN
            else "no",
            "yes" if name in FAMILIES else "no",
            "yes" if name in FAMILIES and generates(name) else "no",
            "yes" if name in FAMILIES else "no",
            INEXPRESSIBLE.get(
                name, "" if name in FAMILIES and generates(name) else "sinks, in generation"
            ),
        )
        for name in sorted({*CUTTABLE, *SHOWN, *FAMILIES})
    ]


def generates(name: str) -> bool:
    """Whether `helix generate` computes models of a type that can be converted."""
    family = FAMILIES[name]
    known = {key for piece in family.pieces for key in piece.keys}
    flags = family.model_flags({key: size for key, size in SIZES.items() if key in known})
    try:
        check_attention(ModelConfig.from_flags(flags))
    except HelixError:
        return False
    return True


def page() -> str:
    """The page with the table of today."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{markdown_table(HEADER, rows())}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
