"""Runs side by side: which are compared, by how much they differ, and the table that shows it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from synthetic_runs import (
    DENSE,
    MIXTURE,
    STOCK,
    curve,
    example,
    read,
    rows_of,
    write_run,
    write_three,
)

from helix_megatron.errors import HelixError
from helix_megatron.training.metrics import (
    DESCRIPTION_FILE,
    METRICS_FILE,
    MetricsWriters,
    write_run_description,
)
from helix_megatron.training.report_picture import draw_losses
from helix_megatron.training.report_runs import Run, compare, read_run
from helix_megatron.training.report_table import (
    attention_text,
    layout_text,
    table_numbers,
    table_text,
)


def test_the_table_shows_runs_side_by_side(tmp_path):
    """The table that the quickstart ends with."""
    rows = rows_of(read(*write_three(tmp_path)))
    assert rows == {
        "ranks": ["1", "4", "4"],
        "layout": ["TP 1", "TP 4 (m 2, n 2)", "TP 4 (m 2, n 2)"],
        "attention": ["stock", "exact, all-to-all", "exact, all-to-all"],
        "iterations": ["50", "50", "50"],
        "loss at iteration 1": ["4.8537", "4.8537", "4.6537"],
        "loss at iteration 10": ["3.8196", "3.8196", "3.6196"],
        "loss at iteration 25": ["2.8595", "2.8595", "2.6595"],
        "loss at iteration 50": ["2.2463", "2.2463", "2.0463"],
        "largest |loss difference|": ["baseline", "3e-07", "–"],
        "tokens/s": ["10.0k", "10.0k", "10.0k"],
        "communication, ms/token": ["0.0123", "0.0123", "0.0123"],
        "sent in attention, bytes/token": ["3,072", "3,072", "3,072"],
        "sent elsewhere, bytes/token": ["12,288", "12,288", "12,288"],
        "memory of a rank": ["401 MiB", "401 MiB", "401 MiB"],
    }


def test_the_terminal_table_has_straight_columns(tmp_path):
    """Every line is as wide as the others, with the run's name over its numbers."""
    text = table_text(read(*write_three(tmp_path)))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["stock", "helix", "mixture"]


def test_the_difference_is_the_largest_over_all_iterations(tmp_path):
    """Not that of the last iteration, where the runs agree again."""
    difference = read(*write_three(tmp_path, 0.25)).differences["helix"]
    assert difference.reference == "stock"
    assert difference.iteration == 37
    assert difference.largest == pytest.approx(0.25)
    assert len(difference.by_iteration) == 50


def test_each_model_has_a_baseline_of_its_own(tmp_path):
    """A mixture of experts is never compared with a dense model, but with another run of itself."""
    runs = [*write_three(tmp_path), write_run(tmp_path / "experts", curve(50), model=MIXTURE)]
    comparison = read(*runs)
    assert comparison.references == {
        "stock": None,
        "helix": "stock",
        "mixture": None,
        "experts": "mixture",
    }
    assert comparison.differences["experts"].largest == pytest.approx(0.2)


def test_a_baseline_can_be_chosen(tmp_path):
    """The order of the directories is a shell's, not the user's."""
    comparison = read(*write_three(tmp_path), baseline="helix")
    assert comparison.references == {"stock": "helix", "helix": None, "mixture": None}
    assert rows_of(comparison)["largest |loss difference|"] == ["3e-07", "baseline", "–"]


def test_runs_of_different_lengths_share_what_they_have(tmp_path):
    """A run that was stopped early is compared up to there, and shows where it stopped."""
    comparison = read(
        write_run(tmp_path / "long", curve(300)), write_run(tmp_path / "short", curve(12))
    )
    rows = rows_of(comparison)
    assert comparison.differences["short"].largest == 0
    assert len(comparison.differences["short"].by_iteration) == 12
    assert rows["iterations"] == ["300", "12"]
    assert rows["loss at iteration 250"] == ["2.0000", "–"]
    assert rows["last loss"] == ["2.0000", "3.6464"]


@pytest.mark.parametrize(
    ("length", "milestones"),
    [
        (1, [1]),
        (2, [1, 2]),
        (10, [1, 10]),
        (50, [1, 10, 25, 50]),
        (60, [1, 10, 25, 50, 60]),
        (5000, [1, 250, 500, 1000, 2500, 5000]),
    ],
)
def test_a_table_shows_few_iterations(length, milestones):
    """A long run must not give a long table; the first and the last are always there."""
    records = {i: {"lm_loss": 1.0} for i in range(1, length + 1)}
    run = Run(Path("run"), {"label": "a", "ranks": 1, "layout": STOCK, "model": DENSE}, records)
    assert compare([run]).milestones == milestones


@pytest.mark.parametrize("broken", ["stock", "helix", "both"])
def test_a_loss_that_is_not_finite_is_within_no_limit(tmp_path, broken):
    """NaN compares false with every limit: a naive maximum would pass."""
    losses = curve(8)
    spoiled = [*losses[:4], None, *losses[5:]]
    comparison = read(
        write_run(tmp_path / "stock", losses if broken == "helix" else spoiled),
        write_run(tmp_path / "helix", losses if broken == "stock" else spoiled),
    )
    assert not comparison.differences["helix"].within(1e9)
    assert rows_of(comparison)["largest |loss difference|"] == ["baseline", "not finite at 5"]
    assert draw_losses(comparison).startswith(b"\x89PNG")
    numbers = table_numbers(comparison)[1]["loss_difference"]
    assert (numbers["finite"], numbers["at_iteration"]) == (False, 5)


def test_an_iteration_that_both_skipped_does_not_count(tmp_path):
    """fp16 starts with a loss scale that is too large: both runs overflow alike."""
    runs = [write_run(tmp_path / name, [None, *curve(5)]) for name in ("stock", "helix")]
    for run in runs:
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(
            text.replace('"lm_loss": null', '"lm_loss": null, "skipped": true')
        )
    difference = read(*runs).differences["helix"]
    assert difference.within(0)
    assert list(difference.by_iteration) == [2, 3, 4, 5, 6]


def test_a_resumed_run_counts_what_came_later(tmp_path):
    """A run resumed from the checkpoint of iteration 2 repeats iteration 3."""
    run = write_run(tmp_path / "run", [5.0, 4.0, 3.5])
    with (run / "metrics.jsonl").open("a") as file:
        for iteration, loss in ((3, 3.0), (5, 2.0), (4, 2.5)):
            file.write(f'{{"iteration": {iteration}, "lm_loss": {loss}}}\n\n')
    assert list(read_run(run).losses.items()) == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.5), (5, 2.0)]


def test_metrics_that_were_not_recorded_are_dashes(tmp_path):
    """Another tool's file with losses alone can be compared too."""
    run = write_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 3}\n')
    rows = rows_of(read(run))
    assert rows["tokens/s"] == rows["memory of a rank"] == rows["communication, ms/token"] == ["–"]
    assert rows["loss at iteration 1"] == ["3.0000"]


@pytest.mark.parametrize(("length", "expected"), [(5, 10_000), (3, 1000)])
def test_speed_leaves_out_the_warm_up(tmp_path, length, expected):
    """The first iterations are ten times slower here; a run that has no others shows those."""
    run = read_run(write_run(tmp_path / "run", curve(length)))
    assert run.typical("tokens_per_second") == expected


def test_what_the_writers_write_can_be_read(tmp_path):
    """The two halves agree on names and file names; a loss of NaN survives as NaN."""
    description = {"label": "run", "ranks": 1, "layout": STOCK, "model": DENSE}
    write_run_description(tmp_path / DESCRIPTION_FILE, description)
    with MetricsWriters(jsonl=tmp_path / METRICS_FILE) as writers:
        writers.write(example(1, validation_loss=3.5))
        writers.write(example(2, lm_loss=math.nan))
    run = read_run(tmp_path)
    assert run.description == description
    assert run.losses == {1: example().lm_loss, 2: pytest.approx(math.nan, nan_ok=True)}
    rows = rows_of(read(tmp_path))
    assert rows["last validation loss"] == ["3.5000"]
    assert rows["memory of a rank"] == ["412 MiB"]


@pytest.mark.parametrize(
    ("layout", "layout_cell", "attention_cell"),
    [
        ({"tp": 2, "pp": 2, "dp": 4, "ep": 1, "m": 1, "n": 2}, "TP 2, PP 2, DP 4", "stock"),
        ({"tp": 8, "m": 4, "n": 2, "ep": 8} | {"attention": "exact", "exchange": "gather-kv"},
         "TP 8 (m 4, n 2), EP 8", "exact, gather-kv"),
        ({"tp": 2, "m": 2, "n": 1, "attention": "segment-local", "exchange": None},
         "TP 2 (m 2, n 1)", "segment-local"),
        ({"tp": 10, "pp": 11, "dp": 1}, "TP 10, PP 11", "stock"),
        ({}, "TP 1", "stock"),
    ],
)  # fmt: skip
def test_a_layout_in_words(layout, layout_cell, attention_cell):
    """Degrees of 1 would bury the one that matters."""
    assert (layout_text(layout), attention_text(layout)) == (layout_cell, attention_cell)


@pytest.mark.parametrize("name", [DESCRIPTION_FILE, METRICS_FILE])
def test_runs_of_strangers(tmp_path, name):
    """What is nested without end, too long for a number, or no file at all, is a sentence."""
    directory = write_run(tmp_path / "run", curve(3))
    for text in (
        "[" * 100_000,
        '{"iteration": ' + "9" * 5000 + "}",
        '{"a":' + "[" * 200 + "]" * 200 + "}",
    ):
        (directory / name).write_text(text)
        with pytest.raises(HelixError, match=rf"{name}.* (is not JSON|not JSON|nested more than)"):
            read_run(directory)
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(HelixError, match=f"{name} is no file"):
        read_run(directory)
