"""scripts/upstream_tests.py on a stand-in for a checkout: what each side passes, and whether heads were cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mini_megatron_lm
import pytest
from megatron.core import package_info
from waiting import PROGRAM_LIMIT

import upstream_tests

SCRIPT = Path(__file__).parents[2] / "scripts" / "upstream_tests.py"
UNIT_TESTS = """
import os

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_submodules,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention


def layer(size):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend="nccl")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        use_cpu_initialization=True,
    )
    spec = get_gpt_layer_with_transformer_engine_submodules().self_attention.submodules
    return SelfAttention(config, spec, layer_number=1)


def test_one_rank():
    assert isinstance(layer(1), SelfAttention)


def test_two_ranks():
    output, bias = layer(2)(torch.ones(4, 1, 16), torch.ones(4, 4).triu(1).bool()[None, None])
    assert output.shape == (4, 1, 16)


def test_stock_alone():
    assert type(layer(2)).__name__ == "SelfAttention"


@pytest.mark.internal
def test_one_rank_of_two():
    assert os.environ["RANK"] == "0", "this is the other rank"


def test_neither():
    pytest.skip("never")


def test_the_end():
    os._exit(1)


def test_behind_it():
    pass
"""


@pytest.mark.full("attention")
def test_both_sides_are_run_and_compared(tmp_path: Path) -> None:
    """A test that did not build the layer, or that failed on one rank only, must not pass as a witness."""
    mini_megatron_lm.write(tmp_path)
    core, tests = tmp_path / "megatron" / "core", tmp_path / "unit"
    core.mkdir(parents=True)
    tests.mkdir()
    (core / "package_info.py").write_text(Path(package_info.__file__).read_text())
    (tests / "test_attention.py").write_text(UNIT_TESTS)
    flags = ["--tests", "unit/test_attention.py", "--ranks", "2", "--segments", "2"]
    flags += ["--at-once", "4"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *flags],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
    )
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert done.returncode == 1, done.stdout + done.stderr
    for line in (
        "passed     passed     test_one_rank",
        "passed     passed *   test_two_ranks",
        "failed     failed     test_one_rank_of_two  (AssertionError: this is the other rank)",
        "skipped    skipped    test_neither  (never)",
        "failed     failed     test_the_end  (a rank ended, or it took longer than 300 s)",
        "passed     passed     test_behind_it",
        "passed of 7: 4 with stock attention; 3 with m = 2; 1 with stock attention alone.",
    ):
        assert line in lines, done.stdout + done.stderr
    assert any(line.startswith("passed     failed *   test_stock_alone  (") for line in lines)


def test_a_checkout_of_another_version_is_refused(tmp_path: Path) -> None:
    """Helix's tables go by the installed core, and would be those of another version."""
    core = tmp_path / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 99\nPATCH = 1\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
    )
    assert done.returncode == 2
    text = " ".join(done.stderr.split())
    assert f"{tmp_path} is of megatron-core 0.99.1, and this Python has " in text
    assert text.endswith("Run it in an environment with megatron-core 0.99.")


def test_a_test_that_only_stock_attention_passes_decides(capsys: pytest.CaptureFixture) -> None:
    """One that both fail, or that Helix alone passes, does not."""
    passed, failed = ["passed", "", True], ["failed", "no such thing", False]
    assert (
        upstream_tests.report({1: {"a": passed, "b": failed}, 2: {"a": passed, "b": passed}}) == 0
    )
    assert upstream_tests.report({1: {"a": passed}, 2: {"a": failed}, 4: {"a": passed}}) == 1
    assert upstream_tests.report({1: {"a": passed}, 2: {}}) == 1, "not run"
    assert "(no such thing)" in capsys.readouterr().out
