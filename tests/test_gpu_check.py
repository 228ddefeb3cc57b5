"""scripts/gpu_check.sh: a machine without a GPU, steps that fail, and all of it on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_check
import gpu_check_paged
from helix_megatron.core.kernels import paged

SCRIPT = Path(gpu_check.__file__).with_suffix(".sh")


def run(*arguments: str, seconds: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )


class FailingKernel:
    """A kernel over pages that takes everything, or nothing, and computes nothing."""

    NAME = "Broken"

    def __init__(self, takes: bool) -> None:
        self.takes = lambda *tensors: takes

    def prepare(self, step: Any, back: int | None) -> None:
        raise RuntimeError("no such instruction")


@pytest.mark.parametrize(("kernels", "good"), [((), True), ((False,), True), ((True,), False)])
def test_a_kernel_over_pages_must_compute_what_it_takes(monkeypatch, kernels, good):
    """One that fails at everything would else be a page on which all is well."""
    found = paged.Kernels(tuple(FailingKernel(takes) for takes in kernels), "")
    monkeypatch.setattr(paged, "paged_kernels", lambda device: found)
    assert gpu_check_paged.differences("cpu")[2] is good


def test_without_a_gpu_it_ends_with_one_sentence(tmp_path):
    """Nobody should take a page of the CPU for one of GPUs."""
    done = run("--output", str(tmp_path / "page.md"))
    assert done.returncode == 2
    assert done.stdout == (
        "torch sees no NVIDIA GPU here, so there is nothing to check (--device cpu tries the script).\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_python_without_torch_is_a_sentence(tmp_path):
    """The first thing that goes wrong on somebody else's machine."""
    (tmp_path / "torch.py").write_text("raise ImportError")
    done = subprocess.run(
        [SCRIPT],
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.endswith(
        "cannot import torch. Try PYTHON=/path/to/python, one that has it.\n"
    )


@pytest.mark.parametrize(
    ("gpus", "ranks"), [(1, 4), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (16, 8)]
)
def test_ranks_have_a_gpu_each_or_share_the_only_one(gpus, ranks):
    """NCCL refuses two ranks on one GPU; the page says what its times are worth."""
    machine = gpu_check.Machine("cuda", gpus)
    assert machine.ranks == ranks
    assert ("gloo" in machine.exchange) == (gpus == 1)


def test_a_step_that_fails_or_hangs_costs_its_own_table_only(monkeypatch, tmp_path, capsys):
    """A report from somebody else's machine is most needed when something is wrong there."""
    program = tmp_path / "steps.py"
    program.write_text(
        "import sys, time\n"
        "step = sys.argv[2]\n"
        "print('| a table |', flush=True)\n"
        "if step == 'hangs': time.sleep(1000)\n"
        "if step == 'fails': raise RuntimeError('an illegal memory access')\n"
    )
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    steps = {name: (name.title(), lambda machine: 0, 300) for name in ("works", "fails", "hangs")}
    steps["hangs"] = (*steps["hangs"][:2], 6)
    monkeypatch.setattr(gpu_check, "MINUTES", 60)
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    monkeypatch.setattr(gpu_check, "environment", lambda *of: "versions\n")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    page = tmp_path / "page.md"
    assert gpu_check.write_page(gpu_check.Machine("cpu", 0), page) == 1
    text = page.read_text()
    assert "**Fails: status 1; Hangs: stopped after 6 s**" in text
    assert text.count("| a table |") >= 2
    assert "RuntimeError: an illegal memory access" in text
    assert "Fails: status 1" in capsys.readouterr().out


@pytest.mark.full("attention")
def test_all_of_it_runs_on_the_cpu(tmp_path):
    """Else it would be tried for the first time on a machine that is rented by the hour."""
    page = tmp_path / "page.md"
    done = run("--device", "cpu", "--output", str(page))
    assert done.returncode == 0, page.read_text()
    text = page.read_text()
    assert "**all 4 steps are as they should be**" in text
    for title, *_ in gpu_check.STEPS.values():
        assert f"\n## {title}\n" in text
    assert "| gather-kv | GQA 8/2 | 2 × 2 | gloo |" in text
    assert "| Helix, m = 2 |" in text
    assert "exchange gather-kv." in text
    assert "**wrong**" not in text
