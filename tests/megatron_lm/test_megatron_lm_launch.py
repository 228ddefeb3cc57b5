"""`python -m helix_megatron.launch`: a script runs as it would by itself, with Helix in it.

The checkout is a small stand-in (tests/mini_megatron_lm.py); test_megatron_lm_checkout.py has the real one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mini_megatron_lm
import pytest
from waiting import PROGRAM_LIMIT

from helix_megatron.megatron_lm.table import found_version

HEADS = ["--num-attention-heads", "2", "--helix-layout-free-init"]
FOUR = ["--tensor-model-parallel-size", "4", "--intra-head-parallel-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    mini_megatron_lm.write(folder)
    return folder


def launch(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "helix_megatron.launch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
        cwd=cwd,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def test_four_ranks_of_two_heads_train_like_one(pool, folder) -> None:
    """The point of it all: the script is not changed, and TP 4 with 2 heads gives the losses of TP 1."""
    one = pool.run(mini_megatron_lm.train, str(folder), *HEADS, world_size=1)[0]
    four = pool.run(mini_megatron_lm.train, str(folder), *HEADS, *FOUR, world_size=4)
    assert len(one["losses"]) == 3 and one["losses"][0] > one["losses"][2]
    assert not one["intra_head"] and four[0]["intra_head"]
    for rank in four:
        assert rank["losses"] == pytest.approx(one["losses"], abs=2e-6)


def test_head_groups_share_dropout(pool, folder) -> None:
    """Without the head group's random state a run with Megatron's default dropout of 0.1 could not start."""
    flags = [*HEADS, *FOUR, "--attention-dropout", "0.5"]
    ranks = pool.run(mini_megatron_lm.train, str(folder), *flags, world_size=4)
    assert len({tuple(rank["losses"]) for rank in ranks}) == 1
    plain = pool.run(mini_megatron_lm.train, str(folder), *HEADS, world_size=1)[0]
    assert ranks[0]["losses"] != pytest.approx(plain["losses"], abs=1e-3)


def test_dry_run_says_what_it_would_be(pool, folder, capfd) -> None:
    """Configuration, groups and every hook with file and line, and then no model is built."""
    done = launch(folder / "pretrain_gpt.py", "--helix-dry-run", "--intra-head-parallel-size", "1")
    assert done.returncode == 0, done.stderr
    assert "losses" not in done.stdout
    assert "Attention: stock Megatron (intra-head parallel size 1)." in done.stdout
    assert "intra-head (segments" not in done.stdout
    assert re.search(
        r"TransformerConfig, where it differs.*\n(.*\n)*?  hidden_size = 16", done.stdout
    )
    assert (
        f"{folder}/megatron/training/arguments.py:9  megatron.training.arguments.add_mega"
        in done.stdout
    )
    assert "CPU device count: One device:" in done.stdout
    flags = ["--helix-dry-run", *HEADS, *FOUR]
    outcome = pool.run(printed, str(folder), *flags, world_size=4)
    assert outcome[1:] == [(0, "")] * 3
    status, text = outcome[0]
    assert status == 0
    assert "  intra-head (segments of a head group): [0, 1] [2, 3]\n" in text
    assert "  head group (equal segments): [0, 2] [1, 3]\n" in text
    assert "  tensor parallel rank 3: query heads 1-1 (segment 1)" in text


def printed(folder: str, *flags: str) -> tuple[object, str]:
    """Exit status and standard output of a script that ends before it trains, on this rank."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            mini_megatron_lm.train(folder, *flags)
        except SystemExit as end:
            return end.code, text.getvalue()
    raise AssertionError("the script goes on")


def test_help_of_the_script_shows_the_flags(pool, folder) -> None:
    """Nobody should have to read our documentation to find the flag."""
    ((status, text),) = pool.run(printed, str(folder), "--help", world_size=1)
    assert status == 0
    for flag in ("--num-attention-heads", "--intra-head-parallel-size", "--helix-dry-run"):
        assert flag in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--intra-head-parallel-size", "3", "--tensor-model-parallel-size", "4"],
            "intra-head parallel size 3 does not divide the tensor parallel size 4. Valid: 1, 2, 4.",
        ),
        (
            [*FOUR[2:], "--tensor-model-parallel-size", "2", "--multi-latent-attention"],
            "multi_latent_attention = True does not work with cut heads",
        ),
    ],
)
def test_wrong_input_is_a_paragraph_and_status_2(pool, folder, flags, message) -> None:
    """Nothing else is said, whatever the framework would say."""
    ((status, text),) = pool.run(refused, str(folder), *flags, world_size=1)
    assert status == 2
    assert message in " ".join(text.split())
    assert text.startswith("pretrain_gpt.py: error: ")


def refused(folder: str, *flags: str) -> tuple[object, str]:
    """Exit status and standard error."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as end:
        mini_megatron_lm.train(folder, *flags)
    return end.value.code, text.getvalue()


def test_no_script_and_no_checkout(tmp_path) -> None:
    """What is most likely to be mistyped is the path."""
    done = launch("no/such/script.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no script no/such/script.py" in done.stderr
    lonely = tmp_path / "train.py"
    lonely.write_text("print('ran')")
    done = launch(lonely)
    if found_version() >= (0, 18):  # whose package has megatron.training
        assert (done.returncode, done.stdout) == (0, "ran\n")
    else:
        assert (done.returncode, done.stdout) == (2, "")
        assert "no megatron.training beside" in done.stderr
    done = launch()
    assert done.returncode == 2
    assert done.stderr.startswith("usage: torchrun")
    assert launch("--help").returncode == 0


@pytest.mark.full("training")
def test_processes_that_the_script_spawns_find_its_functions(folder) -> None:
    """Saving a checkpoint spawns a process, which begins by importing the main module anew."""
    done = launch(folder / "pretrain_gpt.py", "--spawn")
    assert done.returncode == 0, done.stderr
    known = "'pretrain_gpt.py', {'number': <class 'int'>})"
    assert f"parent: (2, '__main__', {known}" in done.stdout
    assert f"child: (2, '__mp_main__', {known}" in done.stdout


def test_arguments_that_never_come_by_are_an_error(pool, folder) -> None:
    """--yaml-cfg ignores the command line: the flag would be without effect in silence."""
    flags = ["--yaml-cfg", "--intra-head-parallel-size", "2"]
    ((status, text),) = pool.run(refused, str(folder), *flags, world_size=1)
    assert status == 2
    assert "did not let Megatron-LM validate its arguments" in text.replace("\n", " ")
    assert "Traceback" not in text
