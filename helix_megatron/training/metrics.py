"""What one training iteration says of itself, and where it is written: JSON lines, TensorBoard, W&B.

A run's directory holds two files, which `helix_megatron.training.report` reads:

    metrics.jsonl   one JSON object per iteration, `IterationMetrics.record`
    run.json        what was trained, on which layout, by which command, `write_run_description`

One rank opens `MetricsWriters`; the others open it with no destination, which does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint.durable import write_durably
from helix_megatron.errors import HelixError
from helix_megatron.versions import installed

METRICS_FILE = "metrics.jsonl"
DESCRIPTION_FILE = "run.json"

# What the report cannot do without, and the JSON type of each.
REQUIRED_ENTRIES: dict[str, type] = {"label": str, "ranks": int, "layout": dict, "model": dict}


@dataclass(frozen=True)
class IterationMetrics:
    """One iteration of training. *Token* always means a token of the global batch, on whatever rank.

    Args:
        iteration: number of the iteration, from 1.
        lm_loss: language-model loss, nats per token, mean over the global batch.
        grad_norm: 2-norm of all gradients before clipping, after unscaling; None when not computed.
        learning_rate: of this iteration's step.
        tokens_per_second: tokens of the global batch over the iteration's time, all ranks together.
        iteration_ms: wall time of the iteration, milliseconds.
        comm_ms_per_token: milliseconds that this rank spent in collectives and sends, per token; times
            `tokens_per_second` / 1000 it is the share of time spent communicating.
        attention_bytes_per_token: bytes that this rank sent inside core attention, per token, forward and
            backward together.
        other_bytes_per_token: bytes that this rank sent for all else (tensor, pipeline, data and expert
            parallelism), per token.
        memory_bytes: memory of this rank, as `memory_bytes()` gives it.
        consumed_samples: sequences seen since the start of training, this iteration's included.
        consumed_tokens: tokens seen since the start of training.
        elapsed_seconds: wall time since this process began to train.
        loss_scale: factor on the loss against underflow; 1 but for fp16.
        skipped: the optimizer skipped its step because a gradient overflowed.
        validation_loss: nats per token, on iterations that validate.
        gpu_utilization: percent of the last sample period in which the GPU was busy (`GpuUtilization`).
        extra_losses: further terms by name, such as `load_balancing_loss`.
    """

    iteration: int
    lm_loss: float
    grad_norm: float | None
    learning_rate: float
    tokens_per_second: float
    iteration_ms: float
    comm_ms_per_token: float
    attention_bytes_per_token: float
    other_bytes_per_token: float
    memory_bytes: int
    consumed_samples: int
    consumed_tokens: int
    elapsed_seconds: float
    loss_scale: float = 1.0
    skipped: bool = False
    validation_loss: float | None = None
    gpu_utilization: float | None = None
    extra_losses: Mapping[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Flat, without what was not measured: `extra_losses` become entries of their own."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        extra = own.pop("extra_losses")
        assert not own.keys() & extra.keys(), f"a loss has the name of a metric: {sorted(extra)}"
        return {name: value for name, value in (own | extra).items() if value is not None}


def memory_bytes() -> int:
    """Memory of this process in bytes: peak of tensors on a GPU, else the resident set right now."""
    import torch

    if (
        torch.cuda.is_initialized()
    ):  # a run on the CPU of a machine with GPUs never initialises CUDA
        return torch.cuda.max_memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


class GpuUtilization:
    """Reads, through NVML, how busy this process's GPU is; gives None where there is nothing to read."""

    def __init__(self) -> None:
        self._nvml: Any = None
        import torch

        if not torch.cuda.is_available():
            return
        try:
            import pynvml
        except ImportError:
            return
        try:
            pynvml.nvmlInit()
            # NVML counts all GPUs of the machine, torch the visible ones: only the UUID names the same one.
            uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except pynvml.NVMLError:
            return

    def read(self) -> float | None:
        """Percent of the last sample period in which a kernel ran, or None."""
        if self._nvml is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)
        except self._nvml.NVMLError:  # a MIG slice, for one, has no figure of its own
            return None


class MetricsWriters(contextlib.AbstractContextManager["MetricsWriters"]):
    """Writes every iteration to the destinations asked for; a context manager.

    Open it with destinations on one rank only. Without any it does nothing.

    Args:
        jsonl: file for JSON lines. Each line is complete as soon as `write` returns, so that a run can be
            followed with `tail -f`, and what a killed run wrote can be read.
        tensorboard_dir: directory for TensorBoard event files.
        wandb_project: Weights & Biases project.
        run_name: name of the run in Weights & Biases.
        config: the run's description, shown by Weights & Biases.
        resume: the last iteration of the run that this one continues: what an existing JSON-lines file holds
            up to there stays, what it holds of later iterations will be written again. 0 starts it afresh.

    Raises:
        HelixError: a destination cannot be opened; those opened before it are closed.
    """

    def __init__(
        self,
        *,
        jsonl: str | os.PathLike[str] | None = None,
        tensorboard_dir: str | os.PathLike[str] | None = None,
        wandb_project: str | None = None,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume: int = 0,
    ) -> None:
        self._sinks: list[Callable[[dict[str, Any]], None]] = []
        with contextlib.ExitStack() as opened:
            if jsonl is not None:
                self._sinks.append(_json_lines(opened, Path(jsonl), resume))
            if tensorboard_dir is not None:
                self._sinks.append(_tensorboard(opened, os.fspath(tensorboard_dir)))
            if wandb_project is not None:
                self._sinks.append(_wandb(opened, wandb_project, run_name, config))
            self._opened = opened.pop_all()

    def write(self, metrics: IterationMetrics) -> None:
        record = metrics.record()
        for sink in self._sinks:
            sink(record)

    def close(self) -> None:
        """Flush and close everything. Closing again does nothing."""
        self._sinks.clear()
        self._opened.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def _json_lines(
    opened: contextlib.ExitStack, path: Path, resume: int
) -> Callable[[dict[str, Any]], None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.exists():
            _keep_until(path, resume)
        mode = "a" if resume else "w"
        file = opened.enter_context(path.open(mode, buffering=1, encoding="utf-8"))
    except OSError as error:
        raise HelixError(
            f"cannot write metrics to {path}: {error.strerror}. Give --metrics-jsonl a file in a "
            "directory that you may write to, such as runs/mine/metrics.jsonl."
        ) from error
    return lambda record: print(json.dumps(json_safe(record), allow_nan=False), file=file)


def _keep_until(path: Path, iteration: int) -> None:
    """Cut what follows the line of an iteration: later ones, and what a killed process left of a line."""
    with path.open("r+b") as file:
        kept = 0
        for line in file:
            if not line.endswith(b"\n") or not _is_of_before(line, iteration):
                break
            kept += len(line)
        file.truncate(kept)


def _is_of_before(line: bytes, iteration: int) -> bool:
    """Whether a line is a record of an iteration up to this one; one that is damaged is of none."""
    try:
        found = json.loads(line)["iteration"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return type(found) is int and found <= iteration


def _tensorboard(opened: contextlib.ExitStack, directory: str) -> Callable[[dict[str, Any]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise HelixError(
            "--tensorboard-dir needs the package tensorboard, which is not installed. Run "
            "`pip install tensorboard`, or leave the flag out."
        ) from error
    try:
        writer = SummaryWriter(directory)
    except OSError as error:
        raise HelixError(
            f"cannot write TensorBoard events to {directory}: {error.strerror}. Give "
            "--tensorboard-dir a directory that you may write to."
        ) from error
    opened.callback(writer.close)

    def write(record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "iteration":
                writer.add_scalar(name, float(value), record["iteration"])

    return write


def _wandb(
    opened: contextlib.ExitStack,
    project: str,
    run_name: str | None,
    config: Mapping[str, Any] | None,
) -> Callable[[dict[str, Any]], None]:
    try:
        import wandb
    except ImportError as error:
        raise HelixError(
            "--wandb-project needs the package wandb, which is not installed. Run "
            "`pip install wandb` and `wandb login`, or leave the flag out."
        ) from error
    try:
        run = wandb.init(project=project, name=run_name, config=dict(config or {}))
    except wandb.Error as error:
        raise HelixError(
            f"Weights & Biases cannot start project {project!r}: {error}. Run `wandb login`, or set "
            "WANDB_MODE=offline to keep the run on this machine."
        ) from error
    opened.callback(run.finish)
    return lambda record: run.log(record, step=record["iteration"])


def write_run_description(path: str | os.PathLike[str], description: Mapping[str, Any]) -> None:
    """Write `run.json` whole or not at all.

    The report needs the entries

        label       name of the run in tables
        ranks       number of processes
        layout      `tp`, `pp`, `dp`, `ep`, `m`, `n`, `attention`, `exchange`, `query_layout`
        model       whatever decides the losses: runs with equal entries are compared with each other, so
                    that the sizes belong here, and segment-local attention, which is another architecture

    and shows any other (`precision`, `versions`, ...) as a setting; `command` is how to run it again.
    """
    wrong = [k for k, kind in REQUIRED_ENTRIES.items() if not isinstance(description.get(k), kind)]
    assert not wrong, f"the run's description lacks {wrong}, or they have the wrong type"
    text = json.dumps(json_safe(description), indent=2, allow_nan=False, default=str)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"{text}\n".encode())
    except OSError as error:
        raise HelixError(
            f"cannot write the run's description to {path}: {error.strerror}. Choose a directory that "
            "you may write to."
        ) from error


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    return value


def software_versions() -> dict[str, str]:
    """Versions that decide a run's numbers, of those packages that are installed."""
    return installed("torch", "megatron-core", "deepspeed")


def command_line() -> str:
    """The command that started this process, or the launch by torchrun that started all of them."""
    program = [argument for argument in sys.orig_argv[1:] if argument != "-u"]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join(["python", *program])
    return shlex.join(["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], *program])
