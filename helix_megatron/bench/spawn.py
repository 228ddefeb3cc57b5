"""Run a function on the ranks of a process group: processes of our own, or those of torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.flags import whole
from helix_megatron.run.local_ranks import (
    USER_ERROR,
    rank_environment,
    reserved_port,
    supervised,
    wait_for,
)
from helix_megatron.run.rank_environment import MOST_RANKS, launched_ranks

# Types of flags: sizes of what is measured, and ranks of this machine.
SIZE, RANKS = whole(largest=10**7), whole(largest=MOST_RANKS)
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # read when torch is imported; `_rank` sets its own number
    "TORCHDYNAMO_DISABLE": "1",  # megatron-core compiles small functions, which takes longer than it saves
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a process that has asked CUDA itself cannot be forked
}
# What the user asked for, before ENVIRONMENT is applied; else the ranks share the cores.
THREADS = os.environ.get("OMP_NUM_THREADS", "")


def hide_gpus() -> None:
    """Make CUDA unavailable to this process and its children; to be called before torch looks for devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def require_gpu() -> None:
    """Raises:
    HelixError: torch sees no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise HelixError("torch sees no CUDA device here. Try --device cpu.")


def _join_group() -> None:
    """Over NCCL if each rank of this machine has a GPU of its own, else over gloo; GPUs may be hidden."""
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    own = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    dist.init_process_group("nccl" if own else "gloo")


def run_on_ranks(function: Callable[..., Any], *args: Any, ranks: int) -> Any:
    """`function(*args)` on every rank; what rank 0 returned.

    Under torchrun its ranks run it, all of them, and this returns on each what it returned there. Otherwise
    processes are started on this machine; `function` is then a module-level function, and its arguments and
    result are pickled.

    Raises:
        HelixError: raised by a rank; or torchrun started another number of ranks.
    """
    launched = launched_ranks()
    if launched is None:
        return _run_in_processes(_in_group, (function, *args), ranks)
    if launched != ranks:
        raise HelixError(f"this needs {ranks} ranks, and torchrun started {launched}.")
    import torch.distributed as dist

    if not dist.is_initialized():
        _join_group()
    return function(*args)


def launch_on_ranks(function: Callable[..., Any], *args: Any, ranks: int) -> Any:
    """As `run_on_ranks`, in new processes with a launcher's environment; `function` makes its process group.

    Raises:
        HelixError: raised by a rank; or torchrun has started this process.
    """
    if launched_ranks() is not None:
        raise HelixError("this starts its ranks by itself. Run it without torchrun.")
    return _run_in_processes(function, args, ranks)


class _ForkedRank:
    """A process of `multiprocessing` in the form in which ranks are supervised."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        assert process.pid is not None
        self.pid, self._process = process.pid, process

    def poll(self) -> int | None:
        return self._process.exitcode


def _run_in_processes(function: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Forked from one process that has imported torch and megatron-core.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helix_megatron.bench.preload"])
    threads = int(THREADS) if THREADS.isdigit() else max(1, (os.cpu_count() or 1) // ranks)
    started: list[_ForkedRank] = []
    with tempfile.TemporaryDirectory(prefix="helix-bench-") as name:
        directory = Path(name)
        with reserved_port() as port, supervised(started):
            environment = rank_environment(ranks, port)
            for rank in range(ranks):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                work = (function, args, own, directory, threads)
                process = context.Process(target=_rank, args=work)
                process.start()
                started.append(_ForkedRank(process))
            status = wait_for(started)
        for error in sorted(directory.glob("error-*")):
            raise pickle.loads(error.read_bytes())
        if status:
            raise RuntimeError(f"a rank of the benchmark failed with exit status {status}")
        return pickle.loads((directory / "result").read_bytes())


def _rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    directory: Path,
    threads: int,
) -> None:
    import torch

    os.setsid()  # a terminal's Ctrl-C is the parent's business
    os.environ |= environment
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    try:
        result = function(*args)
    except HelixError as error:
        (directory / f"error-{environment['RANK']}").write_bytes(pickle.dumps(error))
        raise SystemExit(USER_ERROR) from None
    if environment["RANK"] == "0":
        (directory / "result").write_bytes(pickle.dumps(result))


def _in_group(function: Callable[..., Any], *args: Any) -> Any:
    import torch.distributed as dist

    _join_group()
    result = function(*args)
    dist.destroy_process_group()
    return result
