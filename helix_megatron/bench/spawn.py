"""Run a function on the ranks of a gloo process group: processes of our own, or those of torchrun."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.local_ranks import LOOPBACK, free_port, has_loopback

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # read when torch is imported; `_rank` sets its own number
    "TORCHDYNAMO_DISABLE": "1",  # megatron-core compiles small functions, which takes longer than it saves
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# What the user asked for, before ENVIRONMENT is applied; else the ranks share the cores.
THREADS = os.environ.get("OMP_NUM_THREADS", "")


def launched_ranks() -> int | None:
    """How many ranks torchrun started, this process being one of them; None without torchrun."""
    if "RANK" not in os.environ:
        return None
    return int(os.environ.get("WORLD_SIZE", "1"))


def hide_gpus() -> None:
    """Make CUDA unavailable to this process and its children; to be called before torch looks for devices."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
        return _run_in_processes(function, args, ranks)
    if launched != ranks:
        raise HelixError(f"this needs {ranks} ranks, and torchrun started {launched}.")
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return function(*args)


def launch_on_ranks(function: Callable[..., Any], *args: Any, ranks: int) -> Any:
    """As `run_on_ranks`, in new processes with a launcher's environment; `function` makes its process group.

    Raises:
        HelixError: raised by a rank; or torchrun has started this process.
    """
    if launched_ranks() is not None:
        raise HelixError("this starts its ranks by itself. Run it without torchrun.")
    return _run_in_processes(_with_port, (free_port(), function, args), ranks, group=False)


def _with_port(port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return function(*args)


def _run_in_processes(
    function: Callable[..., Any], args: tuple[Any, ...], ranks: int, *, group: bool = True
) -> Any:
    import torch.multiprocessing
    from torch.multiprocessing.spawn import ProcessException

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if has_loopback():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    multiprocessing.set_forkserver_preload(["helix_megatron.bench.preload"])
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    threads = int(THREADS) if THREADS.isdigit() else max(1, (os.cpu_count() or 1) // ranks)
    with tempfile.TemporaryDirectory(prefix="helix-bench-") as name:
        directory = Path(name)
        try:
            torch.multiprocessing.start_processes(
                _rank,
                (function, args, ranks, directory, group, threads),
                nprocs=ranks,
                start_method="forkserver",
            )
        except ProcessException:
            for error in sorted(directory.glob("error-*")):
                raise pickle.loads(error.read_bytes()) from None
            raise
        return pickle.loads((directory / "result").read_bytes())


def _rank(
    rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    ranks: int,
    directory: Path,
    group: bool,
    threads: int,
) -> None:
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    if group:
        store = dist.FileStore(str(directory / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    else:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    try:
        result = function(*args)
    except HelixError as error:
        (directory / f"error-{rank}").write_bytes(pickle.dumps(error))
        raise
    if rank == 0:
        (directory / "result").write_bytes(pickle.dumps(result))
    if group:
        dist.destroy_process_group()
