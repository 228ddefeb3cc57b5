"""The live progress line and the units in it."""

from __future__ import annotations

import io
import math
import os

import pytest
from synthetic_runs import example

from helix_megatron import units
from helix_megatron.training import progress
from helix_megatron.training.progress import ProgressLine, fitted, progress_fields


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_line_reads_as_documented():
    """Human units: nobody counts the digits of 432013312 bytes."""
    line = " | ".join(progress_fields(example(), 50, 12.3).values())
    assert line == (
        "iteration 12/50 | lm loss 3.2145 | grad norm 1.23 | 10.2k tokens/s | comm 0.0123 ms/token | "
        "412 MiB | eta 0:12"
    )


def test_what_is_rare_appears_when_it_happens():
    """A skipped step or a validation in the middle of a run must catch the eye; NaN must not raise."""
    fields = progress_fields(
        example(
            lm_loss=math.nan,
            grad_norm=None,
            skipped=True,
            loss_scale=65536.0,
            validation_loss=3.5,
            extra_losses={"load_balancing_loss": 1.02},
        ),
        50,
        0,
    )
    assert "grad norm" not in fields
    assert fields["loss"] == "lm loss nan"
    assert fields["skipped"] == "step skipped, loss scale 65536"
    assert fields["validation"] == "validation loss 3.5000"
    assert fields["extra"] == "load balancing loss 1.02"


def test_a_file_gets_a_plain_line_now_and_then_and_the_last():
    """A log file with control characters or thousands of lines is of no use."""
    stream = io.StringIO()
    with ProgressLine(7, log_interval=3, stream=stream, label="dense") as line:
        for iteration in range(1, 8):
            line.update(example(iteration))
        line.note("saved a checkpoint")
    written = stream.getvalue().splitlines()
    assert [text.split(" | ")[1] for text in written[:-1]] == [
        "iteration 3/7",
        "iteration 6/7",
        "iteration 7/7",
    ]
    assert written[0].startswith("dense | ")
    assert written[-1] == "saved a checkpoint"
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_one_line_rewritten(monkeypatch):
    """Every update erases the one before; closing leaves the last one and goes to a new line."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with ProgressLine(3, stream=stream) as line:
        for iteration in (1, 2, 3):
            line.update(example(iteration))
        line.note("saved a checkpoint")
    shown = stream.getvalue()
    assert shown.count("\n") == 2
    updates = shown.split(progress.ERASE_LINE)[1:]
    assert [text.split(" | ")[0] for text in updates[:3]] == ["1/3", "2/3", "3/3"]
    assert updates[3].startswith("saved a checkpoint\n3/3")
    assert shown.endswith("\n")


def test_a_terminal_without_control_sequences_is_treated_as_a_file(monkeypatch):
    """Such as an editor's shell window."""
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ProgressLine(1, stream=stream).update(example(1))
    assert stream.getvalue().startswith("iteration 1/1 | ")


def test_the_line_follows_the_terminal_width(monkeypatch):
    """Asked for at every update, since windows are resized."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    stream.fileno = lambda: 1  # type: ignore[method-assign]
    width = [200]
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((width[0], 24)))
    line = ProgressLine(50, stream=stream)
    line.update(example())
    width[0] = 40
    line.update(example())
    wide, narrow = stream.getvalue().split(progress.ERASE_LINE)[1:]
    assert wide.endswith("eta 0:11")
    assert narrow == "12/50 | lm loss 3.2145 | 10.2k tokens/s"


def test_a_fitted_line_never_wraps_and_keeps_what_matters():
    """A wrapped line cannot be erased: every update would leave a piece behind."""
    fields = progress_fields(example(extra_losses={"load_balancing_loss": 1.02}), 50, 12)
    parts = " | ".join(fields.values()).split(" | ")
    for columns in range(1, 140):
        line = fitted(fields, columns)
        assert len(line) < columns
        line = line.removeprefix("iteration ")
        assert line[:22] == "12/50 | lm loss 3.2145"[: columns - 1]
        if columns > 22:
            assert set(line.split(" | ")) <= {"12/50", *parts[1:]}, "a part was cut in the middle"
    assert fitted(fields, 140).split(" | ") == parts


def test_the_usual_80_columns_hold_what_was_promised():
    """Loss, speed, communication and memory; a MoE run has one more loss, a quickstart run a label."""
    fields = progress_fields(example(extra_losses={"load_balancing_loss": 1.02}), 50, 12)
    assert fitted({"label": "mixture of experts"} | fields, 80) == (
        "12/50 | lm loss 3.2145 | 10.2k tokens/s | comm 0.0123 ms/token | 412 MiB"
    )


def test_the_time_left_ignores_a_slow_first_iteration():
    """The first iteration takes ten times as long as any other; a mean would promise hours."""
    stream = io.StringIO()
    line = ProgressLine(103, log_interval=3, stream=stream)
    for iteration, milliseconds in ((1, 60_000.0), (2, 1000.0), (3, 1000.0)):
        line.update(example(iteration, iteration_ms=milliseconds))
    assert stream.getvalue().endswith("eta 1:40\n")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.count(0), "0"),
        (units.count(950), "950"),
        (units.count(12.34), "12.3"),
        (units.count(999.7), "1.00k"),
        (units.count(10_234), "10.2k"),
        (units.count(1_250_000), "1.25M"),
        (units.count(math.nan), "nan"),
        (units.size(1023), "1023 B"),
        (units.size(1024), "1.00 KiB"),
        (units.size(1.25 * 2**30), "1.25 GiB"),
        (units.size(139 * 2**40), "139 TiB"),
        (units.duration(0.4), "0:00"),
        (units.duration(59.6), "1:00"),
        (units.duration(3723), "1:02:03"),
    ],
)
def test_units(shown, expected):
    """Three significant digits, and no `1000k` at the edge of a unit."""
    assert shown == expected
