"""What a command prints to, and what it writes: streams that are closed, full or poor; files of the user."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PROGRAM_LIMIT

from helix_megatron import outputs
from helix_megatron.arguments import Parser, exit_on_error, paragraph
from helix_megatron.bench.__main__ import main as bench_main
from helix_megatron.errors import HelixError, counted, divisors
from helix_megatron.flags import OUTPUT_FILE, OUTPUT_TEXT, one_line, real, whole
from helix_megatron.plan.command import plan_main, simulate_main

ROOT = Path(__file__).parent.parent
MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --gpus 4"
PROGRAM = f"{sys.executable} -m helix_megatron.cli"
NAMED = """\
name: '[red]x[/red] [/] :smile:'
chip: h100
gpus_per_domain: 4
domain_bandwidth: 450e9
network_bandwidth: 25e9
"""


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=PROGRAM_LIMIT,
        check=False,
    )


@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        (">&-", 0, ""),
        (
            "> /dev/full",
            1,
            "helix plan: error: an output cannot be used: No space left on device.\n",
        ),
        ("| head -1 > /dev/null; exit ${PIPESTATUS[0]}", 1, ""),
        ("> /dev/full 2>&1", 1, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_a_stream_that_takes_nothing_ends_a_command_with_a_line_at_most(streams, status, said):
    """Longer than a pipe's buffer with --rejected; also where Python does not buffer, as in containers."""
    for unbuffered in ("", "1"):
        done = shell(f"{PROGRAM} plan {MODEL} --rejected {streams}", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode in (status, 0) if "head" in streams else done.returncode == status, (
            done
        )
        assert done.stderr == said


def test_poor_encodings_and_names_that_look_like_markup(tmp_path):
    """ASCII where nothing else can be shown; a name is shown as it is."""
    cluster = tmp_path / "c.yaml"
    cluster.write_text(NAMED)
    done = shell(
        f"{PROGRAM} plan {MODEL} --cluster {cluster}",
        LC_ALL="C",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.isascii()
    assert "[red]x[/red] [/] :smile:" in done.stdout and "4 x h100" in done.stdout


@pytest.mark.parametrize(
    "command", ["simulate", "graph", "bench", "convert", "generate", "serve", "doctor"]
)
def test_help_of_every_command_survives_a_full_disk(command, monkeypatch):
    """In this process: the stream fails when it is flushed."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    from helix_megatron import cli

    monkeypatch.setattr(sys, "stdout", Full())
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 1
    assert errors.getvalue().startswith(
        f"helix {command}: error: an output cannot be used: No space left"
    )


def test_errors_are_one_paragraph_whatever_they_quote():
    """A value can neither move the cursor, nor break lines, nor fill the screen."""
    text = paragraph("helix", "a\nb \x1b[2J \udcff " + "x" * 5000)
    assert text.startswith("helix: error: a b \\x1b[2J \\udcff\nxxx")
    assert text.isprintable() or text.replace("\n", "").isprintable()
    assert len(text) < 1000


def test_errors_of_flags_are_sentences(capsys):
    """No list of all flags before what is wrong."""
    parser = Parser(prog="tool")
    parser.add_argument("--size", type=whole(largest=9))
    for text, said in (
        ("10", "--size is 10. The largest valid value is 9."),
        ("0", "--size is 0. It must be a whole number of at least 1."),
        ("x", "--size is 'x'. It must be a whole number of at least 1."),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--size", text])
        assert end.value.code == 2
        assert capsys.readouterr().err == f"tool: error: {said} Try tool --help.\n"


def test_types_of_flags():
    """What each refuses."""
    for read, wrong in (
        (real(above=0, at_most=1), ("0", "nan", "inf", "1.5", "")),
        (one_line, ("", " ", "a\nb", "\x1b")),
        (OUTPUT_FILE, ("", "-", "a\nb", "\0", "x" * 300, "/".join(["x" * 200] * 30))),
    ):
        for text in wrong:
            with pytest.raises(argparse.ArgumentTypeError):
                read(text)
    assert OUTPUT_TEXT("-") == "-" and OUTPUT_FILE("./-") == "./-"


def test_an_error_of_the_operating_system_is_a_line(capsys):
    """Unless the program that runs is a foreign one, whose traceback is its own."""
    with pytest.raises(SystemExit), exit_on_error("tool"):
        open("/nowhere/x")  # noqa: SIM115
    assert "tool: error: /nowhere/x cannot be used: No such file" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), exit_on_error("tool", foreign=True):
        open("/nowhere/x")  # noqa: SIM115


def test_json_on_standard_output_is_alone_there(capsys, tmp_path, monkeypatch):
    """Whatever else is asked for; no file is called so."""
    monkeypatch.chdir(tmp_path)
    assert plan_main([*MODEL.split(), "--json", "-", "--write", "plan"]) == 0
    json.loads(capsys.readouterr().out)
    assert simulate_main([*MODEL.split(), "--trace", "-"]) == 0
    json.loads(capsys.readouterr().out)
    sizes = "--hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 64 --tensor-model-parallel-size 8"
    monkeypatch.setattr("helix_megatron.bench.traffic.measure_rows", lambda *_: ([], []))
    assert bench_main(["traffic", *sizes.split(), "--sequence-length", "64", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"]["rows"] == []
    assert "8 ranks" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_what_the_user_has_not_named_is_not_replaced(capsys, tmp_path):
    """A plan.md of the user's stays, until they say otherwise."""
    mine = tmp_path / "plan.md"
    mine.write_text("mine")
    arguments = [*MODEL.split(), "--write", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        plan_main(arguments)
    assert end.value.code == 2 and mine.read_text() == "mine"
    assert "holds plan.md already" in " ".join(capsys.readouterr().err.split())
    assert plan_main([*arguments, "--overwrite"]) == 0
    assert mine.read_text() != "mine" and (tmp_path / "plan.json").exists()


def test_outputs_that_cannot_be_are_found_before_the_run(tmp_path):
    """Endings, directories, and files in directories that are not there."""
    outputs.check_file("json", "-")
    for path, endings in (
        (tmp_path, ()),
        (tmp_path / "no" / "x", ()),
        (tmp_path / "x.gif", outputs.PICTURES),
    ):
        with pytest.raises(HelixError):
            outputs.check_file("plot", path, endings)


def test_words_for_numbers():
    """One rank, two ranks; divisors of a large prime without a walk to it."""
    assert [counted(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
    assert divisors(999999937 * 2) == [1, 2, 999999937, 1999999874]
    assert divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]
