"""The report's command line: its files, its exit codes, and what a broken run says."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest
from synthetic_runs import curve, read, write_run, write_three

from helix_megatron.errors import HelixError
from helix_megatron.training import report
from helix_megatron.training.report_runs import read_run
from helix_megatron.training.report_table import table_text


def run_report(capsys, *arguments: object) -> tuple[int, str, str]:
    try:
        code = report.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, " ".join(printed.err.split())


def test_the_command_writes_three_files_and_prints_the_table(tmp_path, capsys):
    """As the quickstart calls it."""
    runs, out = write_three(tmp_path / "runs"), tmp_path / "deep" / "report"
    code, printed, errors = run_report(capsys, *runs, "--out", out, "--max-difference", "1e-4")
    assert (code, errors) == (0, "")
    assert table_text(read(*runs)) in printed
    assert "their losses differ by at most 3e-07 nats per token (iteration 37)." in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "losses.png",
        "report.html",
        "report.json",
    ]
    assert all(f"wrote {path}" in printed for path in out.iterdir())
    numbers = json.loads((out / "report.json").read_text())["runs"]
    assert [run["label"] for run in numbers] == ["stock", "helix", "mixture"]
    assert [run["tokens_per_second"] for run in numbers] == [10_000] * 3
    assert numbers[0]["losses"]["50"] == curve(50)[49]
    assert numbers[0]["loss_difference"] is None
    assert numbers[1]["loss_difference"]["largest"] == pytest.approx(3e-7, rel=1e-6)
    png = base64.b64encode((out / "losses.png").read_bytes()).decode()
    assert png in (out / "report.html").read_text()
    assert "--max-difference 1e-4" in (out / "report.html").read_text()


def test_a_difference_over_the_limit_is_exit_code_1(tmp_path, capsys):
    """The quickstart fails with it, and the report is there to look at."""
    runs, out = write_three(tmp_path / "runs", 2e-3), tmp_path / "out"
    code, _, errors = run_report(capsys, *runs, "--out", out, "--max-difference", "1e-4")
    assert code == 1
    assert errors == (
        "helix_megatron.training.report: “helix” and “stock” train the same model: over 50 iterations "
        "their losses differ by at most 0.002 nats per token (iteration 37). "
        "helix_megatron.training.report: that is not within --max-difference 0.0001. Compare the runs' "
        "settings in report.html: seed, precision, global batch and data must be the same."
    )
    assert (out / "report.html").exists()
    assert run_report(capsys, *runs, "--out", out)[0] == 2, (
        "the report that is there is not replaced"
    )
    assert run_report(capsys, *runs, "--out", out, "--overwrite")[0] == 0
    limit = ("--max-difference", "0.1")
    assert run_report(capsys, *runs, "--out", out, "--overwrite", *limit)[0] == 0


def test_runs_that_share_no_iteration_do_not_pass(tmp_path, capsys):
    """Nothing compared is not nothing different."""
    runs = [write_run(tmp_path / name, curve(2)) for name in ("a", "b")]
    text = (runs[1] / "metrics.jsonl").read_text()
    (runs[1] / "metrics.jsonl").write_text(text.replace('"iteration": ', '"iteration": 10'))
    code, _, errors = run_report(capsys, *runs, "--out", tmp_path, "--max-difference", "1")
    assert code == 1
    assert "“b” and “a” train the same model, but share no iteration." in errors


def test_a_limit_with_nothing_to_check_is_an_error(tmp_path, capsys):
    """A check that cannot fail would give false comfort."""
    stock, _, mixture = write_three(tmp_path)
    code, _, errors = run_report(
        capsys, stock, mixture, "--out", tmp_path, "--max-difference", "1e-4"
    )
    assert code == 2
    assert "no two of these runs train the same model" in errors
    assert "Add the run to compare with, or leave the flag out." in errors


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "little"])
def test_a_limit_that_limits_nothing_is_refused(tmp_path, capsys, limit):
    """Nothing is greater than NaN or infinity."""
    code, _, errors = run_report(capsys, tmp_path, "--out", tmp_path, f"--max-difference={limit}")
    assert code == 2
    assert "It must be a finite number of at least 0." in errors


def test_labels_must_tell_runs_apart(tmp_path, capsys):
    """Else the table has two columns of one name, and `--baseline` two meanings."""
    run = write_run(tmp_path / "a", curve(2))
    code, _, errors = run_report(capsys, run, run, "--out", tmp_path)
    assert code == 2
    assert "2 runs are called 'a': " in errors
    assert "Give each run once, and each a `label` of its own in its run.json." in errors
    code, _, errors = run_report(capsys, run, "--out", tmp_path, "--baseline", "b")
    assert code == 2
    assert "no run is called 'b'. Valid --baseline: a." in errors


BROKEN = {
    "a directory that is not there": (
        lambda run: None,
        "{run}/none is not a directory. Give the directories of finished runs, each with metrics.jsonl "
        "and run.json.",
    ),
    "no metrics": (
        lambda run: (run / "metrics.jsonl").unlink(),
        "{run}/metrics.jsonl is missing: {run} does not hold a run. Train with --metrics-jsonl "
        "{run}/metrics.jsonl first, or give another directory.",
    ),
    "no description": (
        lambda run: (run / "run.json").unlink(),
        "{run}/run.json is missing: {run} does not hold a run. Train first, or give another directory.",
    ),
    "no iterations": (
        lambda run: (run / "metrics.jsonl").write_text("\n"),
        "{run}/metrics.jsonl holds no iteration. The run ended before its first one; train again and "
        "read what it prints.",
    ),
    "a line cut off": (
        lambda run: (run / "metrics.jsonl").write_text('{"iteration": 1, "lm_loss": 3}\n{"iter'),
        "{run}/metrics.jsonl, line 2: not JSON (Unterminated string starting at): '{{\"iter'. A last line "
        "like this was cut off when the run was killed: delete it. Otherwise train again.",
    ),
    "no iteration number": (
        lambda run: (run / "metrics.jsonl").write_text('{"lm_loss": 3}\n'),
        "{run}/metrics.jsonl, line 1: `iteration` is None; it must be a whole number of at least 1. "
        "Delete the line, or train again.",
    ),
    "not an object": (
        lambda run: (run / "metrics.jsonl").write_text("[1]\n"),
        "{run}/metrics.jsonl, line 1: `iteration` is None; it must be a whole number of at least 1. "
        "Delete the line, or train again.",
    ),
    "no loss": (
        lambda run: (run / "metrics.jsonl").write_text('{"iteration": 1}\n'),
        "{run}/metrics.jsonl, line 1: `lm_loss` is 'missing'; it must be a number, or null for a loss "
        "that is not finite. Delete the line, or train again.",
    ),
    "not text": (
        lambda run: (run / "metrics.jsonl").write_bytes(b"{\xff}"),
        "{run}/metrics.jsonl: byte 1 is not UTF-8 text. The file is damaged; train again.",
    ),
    "a directory in a file's place": (
        lambda run: ((run / "run.json").unlink(), (run / "run.json").mkdir()),
        "{run}/run.json is no file, but a directory, a pipe or a device. Make it readable, or give another "
        "run.",
    ),
    "a description that is not JSON": (
        lambda run: (run / "run.json").write_text('{\n"label": }'),
        "{run}/run.json, line 2: not JSON (Expecting value). Repair the line, or train again.",
    ),
    "a description without a model": (
        lambda run: (run / "run.json").write_text('{"label": "a", "ranks": 1, "layout": {}}'),
        "{run}/run.json: the entry `model` is missing or is not an object. A run's description needs "
        "label, ranks, layout, model; add it, or train again.",
    ),
    "a description that is a list": (
        lambda run: (run / "run.json").write_text("[]"),
        "{run}/run.json: the entry `label` is missing or is not text. A run's description needs label, "
        "ranks, layout, model; add it, or train again.",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_run_says_where_and_what_to_try(tmp_path, capsys, name):
    """The file, the line and a way out; exit code 2, and nothing half-written."""
    spoil, expected = BROKEN[name]
    run, out = write_run(tmp_path / "run", curve(3)), tmp_path / "out"
    spoil(run)
    directory = run / "none" if name == "a directory that is not there" else run
    with pytest.raises(HelixError) as caught:
        read_run(directory)
    assert str(caught.value) == expected.format(run=run)
    code, printed, errors = run_report(capsys, directory, "--out", out)
    assert (code, printed) == (2, "")
    assert errors.startswith("helix_megatron.training.report: error: ")
    assert not out.exists()


def test_a_report_that_cannot_be_written_says_so(tmp_path, capsys):
    """`--out` names a file."""
    run = write_run(tmp_path / "run", curve(3))
    code, _, errors = run_report(capsys, run, "--out", run / "run.json")
    assert code == 2
    assert "Give --out a directory that you may write to." in errors


def test_the_command_runs_without_torch_and_in_any_encoding(tmp_path):
    """It starts at once, and a terminal that lacks a dash shows a question mark instead of a traceback."""
    runs = write_three(tmp_path / "runs")
    program = (
        "import sys; from helix_megatron.training.report import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, runs), "--out", str(tmp_path / "out")],
        capture_output=True,
        check=False,
        env={"PYTHONIOENCODING": "ascii", "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"largest |loss difference|" in done.stdout
    module = subprocess.run(
        [sys.executable, "-m", "helix_megatron.training.report", str(tmp_path), "--out", "x"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
    )
    assert module.returncode == 2
    assert module.stderr.startswith(b"helix_megatron.training.report: error:")
