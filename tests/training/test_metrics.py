"""What a training run records: JSON lines, TensorBoard, Weights & Biases, memory, `run.json`."""

from __future__ import annotations

import json
import math
import sys
import types
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from synthetic_runs import example

from helix_megatron.errors import HelixError
from helix_megatron.training import metrics as module
from helix_megatron.training.metrics import (
    GpuUtilization,
    MetricsWriters,
    command_line,
    memory_bytes,
    software_versions,
    write_run_description,
)

DESCRIPTION = {"label": "dense", "ranks": 1, "layout": {"tp": 1}, "model": {"layers": 2}}


def json_lines(path: Path) -> list[dict]:
    """Strictly: the names NaN and Infinity, which Python reads and others do not, are refused."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# --- JSON lines -------------------------------------------------------------------------------------------


def test_a_line_has_the_promised_names_and_only_what_was_measured(tmp_path):
    """Users' scripts read these names; an absent GPU must not look like one at 0 %."""
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsWriters(jsonl=path) as writers:
        writers.write(example(extra_losses={"load_balancing_loss": 1.02}))
    (record,) = json_lines(path)
    assert record == {
        "iteration": 12,
        "lm_loss": 3.21449,
        "grad_norm": 1.2345,
        "learning_rate": 1e-3,
        "tokens_per_second": 10_234.0,
        "iteration_ms": 300.0,
        "comm_ms_per_token": 0.01234,
        "attention_bytes_per_token": 3072.0,
        "other_bytes_per_token": 12288.0,
        "memory_bytes": 432013312,
        "consumed_samples": 96,
        "consumed_tokens": 12288,
        "elapsed_seconds": 3.5,
        "loss_scale": 1.0,
        "skipped": False,
        "load_balancing_loss": 1.02,
    }


def test_a_loss_that_is_not_finite_is_null(tmp_path):
    """NaN and Infinity are not JSON: one would make the whole file unreadable to other tools."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriters(jsonl=path) as writers:
        writers.write(example(lm_loss=math.nan, grad_norm=math.inf, skipped=True))
    (record,) = json_lines(path)
    assert record["lm_loss"] is None
    assert record["grad_norm"] is None
    assert record["skipped"] is True


def test_a_line_is_complete_while_the_run_goes_on(tmp_path):
    """A killed run must leave what it wrote, and a running one can be followed."""
    path = tmp_path / "metrics.jsonl"
    with MetricsWriters(jsonl=path) as writers:
        for iteration in (1, 2, 3):
            writers.write(example(iteration))
            assert [record["iteration"] for record in json_lines(path)][-1] == iteration


def test_a_new_run_starts_the_file_again_and_a_resumed_one_goes_on(tmp_path):
    """Iterations after the checkpoint are run again; a line cut off by a kill would spoil the one after it."""
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with MetricsWriters(jsonl=path) as writers:
            for iteration in (1, 2, 3):
                writers.write(example(iteration))
    with path.open("a") as file:
        file.write('{"iteration": 4, "lm_l')
    with MetricsWriters(jsonl=path, resume=3) as writers:
        writers.write(example(4))
    assert [record["iteration"] for record in json_lines(path)] == [1, 2, 3, 4]
    with MetricsWriters(jsonl=path, resume=2) as writers:
        writers.write(example(3))
    assert [record["iteration"] for record in json_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "damage",
    [b"\0\0\0\n", b"[1]\n", b'{"x": 1}\n', b'{"iteration": "2"}\n', b"[" * 100_000 + b"\n"],
)
def test_a_resumed_run_goes_on_after_what_is_whole(tmp_path, damage):
    """A machine that lost power leaves anything behind the last records."""
    path = tmp_path / "metrics.jsonl"
    whole = b'{"iteration": 1}\n'
    path.write_bytes(whole + damage + b'{"iteration": 2}\n')
    with MetricsWriters(jsonl=path, resume=2):
        pass
    assert path.read_bytes() == whole


def test_no_destination_writes_nothing(tmp_path, monkeypatch):
    """All ranks but one open the writers so."""
    monkeypatch.chdir(tmp_path)
    with MetricsWriters() as writers:
        writers.write(example())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    """The flag's name tells the user what to change."""
    (tmp_path / "file").touch()
    with pytest.raises(HelixError) as caught:
        MetricsWriters(jsonl=tmp_path / "file" / "metrics.jsonl")
    assert str(caught.value).startswith(f"cannot write metrics to {tmp_path}/file/metrics.jsonl: ")
    assert "Give --metrics-jsonl a file in a directory that you may write to" in str(caught.value)


def test_an_extra_loss_cannot_hide_a_metric():
    """Two entries of one name in a flat record: one would silently win."""
    with pytest.raises(AssertionError, match="a loss has the name of a metric"):
        example(extra_losses={"lm_loss": 1.0}).record()


# --- TensorBoard and Weights & Biases ---------------------------------------------------------------------


def test_tensorboard_gets_every_scalar_at_its_iteration(tmp_path):
    """Read back with TensorBoard's own reader."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs tensorboard: pip install tensorboard",
    )
    with MetricsWriters(tensorboard_dir=tmp_path) as writers:
        writers.write(example(7, gpu_utilization=93.0))
        writers.write(example(8, lm_loss=2.5, validation_loss=2.75))
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(event.step, round(event.value, 3)) for event in events.Scalars("lm_loss")]
    assert losses == [(7, 3.214), (8, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("gpu_utilization")] == [(7, 93.0)]
    assert [(e.step, e.value) for e in events.Scalars("validation_loss")] == [(8, 2.75)]
    assert "iteration" not in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("missing", "destination", "remedy"),
    [
        ("torch.utils.tensorboard", {"tensorboard_dir": "tb"}, "pip install tensorboard"),
        ("wandb", {"wandb_project": "helix"}, "pip install wandb"),
    ],
)
def test_a_missing_package_says_what_to_install(
    tmp_path, monkeypatch, missing, destination, remedy
):
    """The user asked for it by a flag; and what was opened before it must not stay open."""
    monkeypatch.setitem(sys.modules, missing, None)
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(HelixError, match=f"which is not installed. Run `{remedy}`"):
        MetricsWriters(jsonl=path, **destination)
    assert path.exists()
    assert str(path) not in [file.path for file in psutil.Process().open_files()]


class FakeWandb(types.ModuleType):
    """Remembers what was asked of it."""

    class Error(Exception):
        pass

    def __init__(self, fault: str = "") -> None:
        super().__init__("wandb")
        self.fault, self.started, self.logged, self.finished = fault, None, [], 0

    def init(self, **settings):
        if self.fault:
            raise self.Error(self.fault)
        self.started = settings
        return self

    def log(self, record, step):
        self.logged.append((step, record["lm_loss"]))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_run_and_is_finished_once(monkeypatch):
    """An unfinished run stays `running` on the server for ever."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriters(wandb_project="helix", run_name="dense", config=DESCRIPTION) as writers:
        writers.write(example(3, lm_loss=2.0))
        writers.close()
    assert wandb.started == {"project": "helix", "name": "dense", "config": DESCRIPTION}
    assert wandb.logged == [(3, 2.0)]
    assert wandb.finished == 1


def test_wandb_without_a_login_says_what_to_do(monkeypatch):
    """The commonest fault on a cluster's compute node."""
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured"))
    with pytest.raises(HelixError) as caught:
        MetricsWriters(wandb_project="helix")
    assert str(caught.value) == (
        "Weights & Biases cannot start project 'helix': api_key not configured. Run `wandb login`, or "
        "set WANDB_MODE=offline to keep the run on this machine."
    )


# --- memory and GPU ---------------------------------------------------------------------------------------


def test_memory_is_the_resident_set_without_a_gpu(monkeypatch):
    """In bytes, not the kilobytes of getrusage: a process with torch takes at least 50 MB."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert 50e6 < memory_bytes() < psutil.virtual_memory().total


def test_memory_is_the_peak_of_tensors_on_a_gpu(monkeypatch):
    """What decides whether a run fits is its peak."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert memory_bytes() == 123


class FakeNvml(types.ModuleType):
    """One GPU, known by its UUID alone."""

    class NVMLError(Exception):
        pass

    def __init__(self, unsupported: bool = False) -> None:
        super().__init__("pynvml")
        self.unsupported = unsupported

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1234":
            raise self.NVMLError(uuid)
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle):
        if self.unsupported:
            raise self.NVMLError("not supported")
        assert handle == "handle"
        return types.SimpleNamespace(gpu=87, memory=40)


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.usefixtures("one_gpu")
def test_utilization_is_that_of_the_gpu_with_this_uuid(monkeypatch):
    """NVML's index 0 is another GPU when CUDA_VISIBLE_DEVICES hides some."""
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert GpuUtilization().read() == 87.0


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("nvml", [None, FakeNvml(unsupported=True)], ids=["absent", "MIG slice"])
def test_utilization_that_cannot_be_read_is_none(monkeypatch, nvml):
    """A figure for the eye must never end a training run."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert GpuUtilization().read() is None


@pytest.mark.usefixtures("one_gpu")
def test_utilization_of_a_gpu_unknown_to_nvml_is_none(monkeypatch):
    """A container may hide the management library's view of the GPU."""
    other = types.SimpleNamespace(uuid="5678")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert GpuUtilization().read() is None


def test_utilization_without_a_gpu_is_none(monkeypatch):
    """NVML may be installed on a machine whose GPUs this process does not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert GpuUtilization().read() is None


# --- run.json ---------------------------------------------------------------------------------------------


def test_the_description_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """The report of a running job must never meet half a file."""
    path = tmp_path / "run" / "run.json"
    write_run_description(path, DESCRIPTION | {"dtype": torch.float32, "limit": math.inf})
    before = json.loads(path.read_text())
    assert before == DESCRIPTION | {"dtype": "torch.float32", "limit": None}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(
        HelixError, match=r"run\.json: No space left on device\. Choose a directory"
    ):
        write_run_description(path, DESCRIPTION | {"ranks": 4})
    assert json.loads(path.read_text()) == before
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_a_description_that_no_report_could_read_is_refused(tmp_path):
    """Found when the run starts, not after a night of training."""
    with pytest.raises(AssertionError, match=r"lacks \['ranks', 'model'\]"):
        write_run_description(tmp_path / "run.json", {"label": "dense", "ranks": "4", "layout": {}})


def test_the_command_line_can_be_pasted(monkeypatch):
    """A process under torchrun sees only its own part of the command."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "a.train", "--label", "a b"])
    assert command_line() == "python -m a.train --label 'a b'"
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-u", "-m", "a.train", "--tp", "4"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert command_line() == "torchrun --nproc-per-node 4 -m a.train --tp 4"


def test_versions_name_what_is_installed():
    """A number without the versions behind it cannot be reproduced."""
    versions = software_versions()
    assert versions["torch"] == version("torch")
    assert {"helix_megatron", "python"} <= versions.keys()
    assert all(versions.values())
