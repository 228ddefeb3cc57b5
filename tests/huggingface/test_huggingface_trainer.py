"""The example script: `Trainer` on sharded models prints the losses of one process, and saves whole weights."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiers import sized
from tiny_transformers import tiny_model

from helix_megatron.errors import HelixError

pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")

ROOT = Path(__file__).parents[2]


def run_script(ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            *(launcher if ranks > 1 else []),
            str(ROOT / "scripts/train_huggingface.py"),
            *flags,
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def logged(run: subprocess.CompletedProcess[str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each line that the Trainer printed."""
    assert run.returncode == 0, run.stderr
    lines = [
        ast.literal_eval(line) for line in run.stdout.splitlines() if line.startswith("{'loss'")
    ]
    return [(float(line["loss"]), float(line["grad_norm"])) for line in lines]


@pytest.mark.full("training")
def test_trainer_prints_the_losses_of_one_process(tmp_path):
    """Batches must not be dealt to ranks, clipping must use the whole norm, and 2 ranks share heads of 2."""
    flags = ("--steps", "6", "--heads", "1")
    whole = run_script(1, *flags, "--save", str(tmp_path / "whole"))
    cut = run_script(2, *flags, "--intra-head-parallel-size", "2", "--save", str(tmp_path / "cut"))
    wanted = logged(whole)
    assert len(wanted) == 6
    assert wanted[-1][0] < wanted[0][0] - 0.3
    assert any(norm > 1.0 for _, norm in wanted), "clipping must happen"
    for found, expected in zip(logged(cut), wanted, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        for name in ("whole", "cut")
    )
    for name, value in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], value, atol=1e-4), name


def test_wrong_input_is_one_paragraph():
    """A mistake on the command line must not print a traceback per rank."""
    ranks = sized("training", full=2, quick=1)
    run = run_script(ranks, "--intra-head-parallel-size", "3")
    assert run.returncode != 0
    text = f"intra-head parallel size 3 does not divide the tensor parallel size {ranks}"
    assert text in " ".join(run.stderr.split())
    assert "train_huggingface.py: error:" in run.stderr
    assert 'File "' not in run.stderr.split("train_huggingface.py: error:")[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "Pass args=TrainingArguments(..., save_strategy='no')"),
        ({"save_strategy": "steps"}, "save_strategy 'steps' would keep one rank's part"),
        ({"save_strategy": "no", "world_size": 8}, "8 ranks train, and 2 hold the model together"),
    ],
)
def test_settings_that_would_lose_something_are_refused(settings, said):
    """An optimizer state of one rank, or half of the batches, would be missed only later."""
    from helix_megatron.huggingface.trainer import ShardedTrainer

    model: Any = tiny_model("llama")
    model.sharding = SimpleNamespace(plan=SimpleNamespace(num_ranks=2))
    arguments = None if settings is None else SimpleNamespace(**{"world_size": 2, **settings})
    with pytest.raises(HelixError) as error:
        ShardedTrainer(model=model, args=arguments)
    assert said in str(error.value)
