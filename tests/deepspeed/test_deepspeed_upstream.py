"""Other releases of DeepSpeed: what they add is handed on, and what they take away is said in one sentence."""

from __future__ import annotations

import sys
import types
import warnings
from typing import Any

import deepspeed_runs
import pytest
import torch
from deepspeed_runs import ON_2, Run

from helix_megatron.deepspeed.cpu import use_cpu

use_cpu()
import deepspeed  # noqa: E402 (after the choice of accelerator)

from helix_megatron.deepspeed import initialize  # noqa: E402
from helix_megatron.deepspeed.upstream import check  # noqa: E402
from helix_megatron.errors import HelixError  # noqa: E402

ACTIVE = {"train_batch_size": 2, "helix": {"intra_head_parallel_size": 2}}


def test_this_release_has_all_that_is_needed():
    """At both ends of the range that setup.py allows."""
    assert check() == []


def test_arguments_of_initialize(monkeypatch):
    """A release may have dropped an argument or taken a new one: the caller's are handed on, no others."""
    calls = []
    monkeypatch.setattr(deepspeed, "initialize", lambda **call: calls.append(call))
    model = torch.nn.Linear(1, 1)
    initialize(model=model, config={"train_batch_size": 2}, schedule="new")
    assert calls == [{"model": model, "config": {"train_batch_size": 2}, "schedule": "new"}]


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (deepspeed.DeepSpeedEngine, "save_16bit_model", "one rank's part of the weights would be"),
        ("deepspeed.moe.layer", "MoE", "faults of its MoE layer would go unnoticed"),
        (
            "deepspeed.runtime.tensor_parallel.init_utils",
            "load_ds_config",
            "cannot be read from a file",
        ),
    ],
)
def test_a_release_without_a_name(monkeypatch, owner, name, said):
    """An AttributeError after the model was cut would leave it cut, and not tell what to install."""
    owner = sys.modules[owner] if isinstance(owner, str) else owner
    monkeypatch.delattr(owner, name)
    (problem,) = check()
    assert f".{name}: " in problem
    assert said in problem
    assert "Helix is tested with deepspeed 0.19.0 to 0.19.8; try pip install" in problem
    with pytest.raises(HelixError) as error:
        initialize(model=torch.nn.Linear(1, 1), config=ACTIVE)
    assert str(error.value) == problem


def test_a_release_whose_engine_takes_no_mpu(monkeypatch):
    """Without it, ZeRO would deal one model's parts as replicas."""

    def other(model: Any = None, config: Any = None, groups: Any = None) -> None:
        raise NotImplementedError

    monkeypatch.setattr(deepspeed, "initialize", other)
    (problem,) = check()
    assert "a deepspeed.initialize that does not take mpu" in problem


def test_a_release_without_the_function_that_is_mended(monkeypatch):
    """Then the fault is mended there, or elsewhere: in either case somebody has to look."""
    monkeypatch.delattr(sys.modules["deepspeed.moe.mappings"], "_gather_tokens")
    (problem,) = check()
    assert "DeepSpeed's MoE layer with tensor parallelism meets cannot be mended" in problem


def test_a_release_without_the_table_of_operators(monkeypatch):
    """It only saves a minute of compilation."""
    monkeypatch.setitem(sys.modules, "deepspeed.ops", types.ModuleType("deepspeed.ops"))
    monkeypatch.setattr(deepspeed, "ops", sys.modules["deepspeed.ops"])
    use_cpu()


def run_notices(directory: str) -> list[str]:
    """Notices of deprecation whose cause is a line of Helix, from an engine that trains, saves and loads."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        engine = deepspeed_runs.build_engine(Run(ON_2, stage=1, precision="bf16"))
        deepspeed_runs.step(engine, 0)
        engine.save_checkpoint(directory)
        engine.load_checkpoint(directory)
    kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    return [
        f"{one.filename}:{one.lineno} {one.message}"
        for one in seen
        if issubclass(one.category, kinds) and "helix_megatron" in one.filename
    ]


def test_no_notice_of_deprecation(pool, tmp_path):
    """A notice today is an error in a release to come. DeepSpeed's own calls of torch give some."""
    for notices in pool.run(
        run_notices, str(tmp_path), world_size=2, timeout=deepspeed_runs.TIMEOUT
    ):
        assert notices == []
