"""Exchanges and cache layouts are known by their registries: costs are asked for, not repeated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from helix_megatron.core.caches import NAMES
from helix_megatron.core.exchanges import EXACT

PACKAGE = Path(__file__).parents[2] / "helix_megatron"
SOURCES = [path for part in ("plan", "graph", "bench") for path in (PACKAGE / part).rglob("*.py")]


def literals(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings that a program reads, docstrings and other prose left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of the strings that something is compared with: `layout.cache == "batch"`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                yield from literals(side)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_exchange_or_cache_layout_is_known_by_name(path):
    """One that is added must not need a word in the planner, the graph or the benchmarks."""
    tree = ast.parse(path.read_text())
    exchanges = {exchange.name for exchange in EXACT}
    assert [found for found in literals(tree) if found[1] in exchanges] == []
    assert [found for found in compared(tree) if found[1] in NAMES] == []


def test_the_walk_finds_names():
    """The test above must be able to fail."""
    tree = ast.parse('kind = {"gather-kv": 1}\nif layout.cache in ("batch", "none"): pass')
    assert (1, "gather-kv") in list(literals(tree))
    assert (2, "batch") in list(compared(tree))
    assert len(SOURCES) > 40
