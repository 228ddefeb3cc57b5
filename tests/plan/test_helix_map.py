"""The map of where cutting heads is faster: its cells are the planner's own comparisons."""

from __future__ import annotations

import pytest

import helix_map
from helix_map import Cell, cell, draw, page
from helix_megatron.plan.clusters import CLUSTERS
from helix_megatron.plan.search import search
from helix_megatron.plan.settings import Job, Software


def test_a_cell_is_the_planners_comparison():
    """One key-value head on 16 GPUs: all copies of a long cache are read without Helix, one with it."""
    found = cell(1, 16, "decode", 512 * 1024, 1)
    plan = search(
        helix_map.model(1), 16, CLUSTERS["nvlink-16"], Job("decode", 512 * 1024, 1), Software()
    )
    fastest = {
        cut: min(row.seconds for row in plan.everything if (row.layout.segments > 1) == cut)
        for cut in (True, False)
    }
    assert found.gain == pytest.approx(fastest[False] / fastest[True] - 1)
    assert found.told_apart and found.gain > found.margin > 0
    assert not cell(8, 8, "decode", 8192, 1).told_apart


def test_the_page_counts_its_cells(tmp_path, monkeypatch):
    """Every kind of cell, in the sentence, the table and the picture."""
    monkeypatch.setattr(helix_map, "GROUPS", (1, 2))
    monkeypatch.setattr(helix_map, "DOMAINS", (8, 16))
    for name, values in (("CONTEXTS", (8192, 32768)), ("BATCHES", (1, 4))):
        monkeypatch.setattr(helix_map, name, dict.fromkeys(helix_map.TITLES, values))
    kinds = [
        Cell(0.5, 0.1, "TP 8 = m 8 × n 1", "TP 8"),
        Cell(-0.3, 0.1, "cut", "whole"),
        Cell(0.05, 0.1, "cut", "whole"),
        Cell(None, 0.0, "cut", ""),
        Cell(None, 0.0, "", ""),
    ]
    keys = [
        (groups, domain, task, context, batch)
        for groups in (1, 2)
        for domain in (8, 16)
        for task in helix_map.TITLES
        for context in (8192, 32768)
        for batch in (1, 4)
    ]
    cells = {key: kinds[min(i % 8, 4)] for i, key in enumerate(keys)}
    text = page(cells)
    sentences = " ".join(text.split())
    of_decode = [cells[key] for key in keys if key[2] == "decode"]
    faster = sum(one.gain == 0.5 for one in of_decode)
    both = sum(one.gain is not None for one in of_decode)
    assert f"of {both} jobs that run either way, cut heads are faster in {faster}, " in sentences
    assert "| 1 | 8 | 8K | 1 | 50% | TP 8 = m 8 × n 1 | TP 8 |" in text
    draw(cells, "decode", tmp_path / "decode.svg")
    assert (tmp_path / "decode.svg").read_text().startswith("<?xml")
