"""A pool of processes that run functions of the tests as ranks of a fresh gloo process group.

Importing torch and megatron-core takes seconds, so the ranks are forked from a server that imported
them once, and live until the test session ends. One run goes like this:

    pool                                    rank
    ----                                    ----
    function, arguments, store      --->    init_process_group, call the function
                                    <---    what it returned, or its traceback
    release (all have answered)     --->    destroy the groups, restore the state of the process
                                    <---    clean; or, with threads left over, replaced

Ranks that returned wait for the release, so that nobody closes a connection that a slower rank
still uses. A rank that raised does not wait: closing its connections wakes the ranks blocked on it.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.managers
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import tiers
import torch
import torch.distributed

MAX_WORLD_SIZE = 16
# All of these only end a hang; the machine may have a hundred times its load.
ANSWER_SECONDS = 300.0
START_SECONDS = 600.0  # the first process imports torch and megatron-core
GRACE_SECONDS = 30.0  # for the ranks whose peer has failed
CLEAN_UP_SECONDS = 300.0
STACK_SECONDS = 30.0  # for a process to write where it is
STACK_QUIET_SECONDS = 0.3  # after which what it wrote is taken to be all
# What keeps a destroyed group alive (DeepSpeed, a reference cycle) keeps its gloo threads, each of which
# wakes up 100 times a second: some hundred of them slow all later tests down several times. A rank has 7 of its
# own, and another is forked in a fifth of a second.
MAX_IDLE_THREADS = 24
READY = b"ready"
TESTS = Path(__file__).parent
# (module, function without arguments): what ends the global state that a test may have created.
TEAR_DOWN = [
    ("helix_megatron.parallel_state", "destroy_model_parallel"),
    ("megatron.core.parallel_state", "destroy_model_parallel"),
    ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
    ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    # Of megatron-core 0.18 and later; earlier ones keep a dictionary, which is emptied below.
    ("megatron.core.transformer.moe.moe_logging", "destroy_moe_metrics_tracker"),
    # Left behind by an exception in the middle of a recompute.
    ("megatron.core.tensor_parallel.random", "_unset_checkpointing"),
    ("helix_megatron.megatron.cpu_runtime", "uninstall"),
]
# What a rank says when the cause is another rank: shown last.
CONSEQUENCE = re.compile(r"Connection (closed|reset)|Broken pipe|[Tt]imed out|gloo/transport")


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the text holds the traceback of the first cause."""


@dataclass(frozen=True)
class Failure:
    """The exception of one rank; `seconds` is the system's monotonic clock, which all processes share."""

    rank: int
    seconds: float
    traceback: str

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts causes before consequences, then by time."""
        return CONSEQUENCE.search(self.traceback) is not None, self.seconds

    @property
    def last_line(self) -> str:
        return self.traceback.rstrip().rsplit("\n", 1)[-1]


@dataclass(frozen=True)
class Job:
    """What a rank needs to know.

    call: the pickled function with its arguments.
    parts: of the full tier, those that run.
    """

    path: list[str]
    parts: set[str]
    call: bytes
    rank: int
    world_size: int
    port: int
    timeout: float


@dataclass
class Worker:
    """One process of the pool as its owner sees it."""

    process: multiprocessing.process.BaseProcess
    connection: multiprocessing.connection.Connection
    stack_file: Path

    def wait_until_ready(self) -> None:
        try:
            ready = self.connection.poll(START_SECONDS) and self.connection.recv_bytes() == READY
        except (EOFError, ConnectionError):
            ready = False
        if not ready:
            raise RankError(f"The process {self.process.name} does not start.")

    def children(self) -> list[psutil.Process]:
        """What a test left behind in it: writers of checkpoints, servers of queues."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def stack(self) -> str:
        """Where the process is now; faulthandler can tell even if it is blocked in a collective."""
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, signal.SIGUSR1)
            deadline = time.monotonic() + STACK_SECONDS
            size, before = 0, -1
            while time.monotonic() < deadline and not 0 < size == before:
                time.sleep(STACK_QUIET_SECONDS)
                size, before = self.stack_file.stat().st_size, size
        return self.stack_file.read_text() or "(no stack)"


class RankPool:
    """Runs functions on the ranks of a fresh process group, in processes that are reused."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["preload"])
        self._directory = tempfile.TemporaryDirectory(prefix="helix-pool-")
        self._queues: multiprocessing.managers.SyncManager | None = None
        self._workers: dict[int, Worker] = {}
        self._started = 0
        # multiprocessing waits for its children at exit; this runs before that and ends them.
        atexit.register(self.close)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        world_size: int,
        timeout: float = ANSWER_SECONDS,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, **kwargs)` on ranks 0 to world_size - 1; their results in order.

        `function` is a module-level function of an importable module, as pickle needs; arguments
        and results are pickled. torch.distributed is initialised with gloo. Afterwards the groups,
        megatron-core's global state, random states and the environment are put back.

        Raises `RankError` if a rank raises, dies or does not answer within `timeout` seconds. Starting
        processes does not count.
        """
        __tracebackhide__ = True
        if not 1 <= world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"world_size is {world_size}. Valid values: 1 to {MAX_WORLD_SIZE}.")
        call = pickle.dumps((function, args, kwargs))
        workers = self._start(world_size)
        deadline = time.monotonic() + timeout
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False
        )
        try:
            for rank, worker in enumerate(workers):
                job = Job(sys.path, tiers.chosen(), call, rank, world_size, store.port, timeout)
                worker.connection.send_bytes(pickle.dumps(job))
            results, failures, lost = self._collect(workers, deadline)
            answered = sorted([*results, *(failure.rank for failure in failures)])
            failures += self._clean_up(answered, released=results)
        except BaseException:  # an interrupt, above all: the ranks are in the middle of something
            for rank in range(world_size):
                self._discard(rank)
            raise
        if failures or lost:
            raise RankError(_report(function, world_size, failures, lost))
        return [results[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End all processes; the pool can be used again afterwards."""
        for worker in self._workers.values():
            worker.connection.close()  # an idle rank leaves its loop at the end of the stream
        for worker in self._workers.values():
            worker.process.join(GRACE_SECONDS)
        for rank in list(self._workers):
            self._discard(rank)
        if self._queues is not None:
            self._queues.shutdown()
            self._queues = None

    def _start(self, world_size: int) -> list[Worker]:
        """The processes of these ranks; those that are missing or have died are started."""
        started = []
        for rank in range(world_size):
            worker = self._workers.get(rank)
            if worker is None or not worker.process.is_alive():
                self._discard(rank)
                self._workers[rank] = self._new_worker(f"rank-{rank}")
                started.append(rank)
        try:
            for rank in started:
                self._workers[rank].wait_until_ready()
        except BaseException:
            for rank in started:
                self._discard(rank)
            raise
        return [self._workers[rank] for rank in range(world_size)]

    def _new_worker(self, name: str) -> Worker:
        self._started += 1
        stack_file = Path(self._directory.name, f"stack-{self._started}")
        stack_file.touch()
        ours, theirs = self._context.Pipe()
        if self._queues is None:
            self._queues = multiprocessing.get_context("spawn").Manager()
        queues = (self._queues.address, bytes(multiprocessing.current_process().authkey))
        # Not a daemon: checkpoint writers start processes of their own, which daemons must not.
        process = self._context.Process(
            target=_serve, args=(theirs, str(stack_file), queues), name=name
        )
        # Python 3.11 does not tell the server where the tests are.
        path = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
        with unittest.mock.patch.dict(os.environ, PYTHONPATH=path):
            process.start()  # the first one starts the server
        theirs.close()
        return Worker(process, ours, stack_file)

    def _discard(self, rank: int) -> None:
        """Kill the process of this rank, if there is one, and what it started; the next run starts another."""
        worker = self._workers.pop(rank, None)
        if worker is not None:
            for child in worker.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def _collect(
        self, workers: list[Worker], deadline: float
    ) -> tuple[dict[int, Any], list[Failure], dict[int, str]]:
        """Wait for every rank: (results, failures, what became of the lost). The lost are killed."""
        results: dict[int, Any] = {}
        failures: list[Failure] = []
        lost: dict[int, str] = {}
        silent = set(range(len(workers)))
        while silent and (seconds_left := deadline - time.monotonic()) > 0:
            connections = [workers[rank].connection for rank in silent]
            ready = multiprocessing.connection.wait(connections, seconds_left)
            for rank in [rank for rank in silent if workers[rank].connection in ready]:
                silent.remove(rank)
                try:
                    answer = pickle.loads(workers[rank].connection.recv_bytes())
                except (EOFError, ConnectionError):
                    workers[rank].process.join(GRACE_SECONDS)
                    lost[rank] = f"died with exit code {workers[rank].process.exitcode}"
                else:
                    if isinstance(answer, Failure):
                        failures.append(answer)
                    else:
                        (results[rank],) = answer
            if failures or lost:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        # All stacks before the first kill: it would wake the others.
        stacks = {rank: workers[rank].stack() for rank in sorted(silent)}
        lost |= {rank: f"did not answer; it was at\n{stack}" for rank, stack in stacks.items()}
        for rank in lost:
            self._discard(rank)
        return results, failures, lost

    def _clean_up(self, answered: list[int], released: Iterable[int]) -> list[Failure]:
        """Wait until the ranks that answered are clean; those that are not then are replaced."""
        for rank in released:
            with contextlib.suppress(ConnectionError):
                self._workers[rank].connection.send_bytes(b"release")
        failures = []
        deadline = time.monotonic() + CLEAN_UP_SECONDS
        for rank in answered:
            connection = self._workers[rank].connection
            threads = 0
            try:
                if connection.poll(max(0.0, deadline - time.monotonic())):
                    problem, threads = pickle.loads(connection.recv_bytes())
                else:
                    problem = f"The clean-up hangs at\n{self._workers[rank].stack()}"
            except (EOFError, ConnectionError):
                problem = "The process died in the clean-up."
            if problem is not None:
                failures.append(Failure(rank, time.monotonic(), problem))
            if problem is not None or threads > MAX_IDLE_THREADS:
                self._discard(rank)
        return failures


def _report(
    function: Callable[..., Any], world_size: int, failures: list[Failure], lost: dict[int, str]
) -> str:
    """What went wrong: the dead, then the first cause in full, then the rest in a line each."""
    lines = [f"{function.__module__}.{function.__qualname__} failed on {world_size} ranks."]
    dead = {rank: fate for rank, fate in lost.items() if "died" in fate}
    lines += [f"Rank {rank} {fate}." for rank, fate in sorted(dead.items())]
    causes = sorted(failures, key=lambda failure: failure.order)
    if causes:
        lines += [f"Rank {causes[0].rank} raised:", causes[0].traceback.rstrip()]
    lines += [f"Rank {failure.rank} raised, too: {failure.last_line}" for failure in causes[1:]]
    stuck = sorted(lost.keys() - dead.keys())
    if stuck:
        lines.append(f"Ranks that did not answer: {', '.join(map(str, stuck))}.")
        lines += [f"Rank {rank} {lost[rank].rstrip()}" for rank in stuck]
    return "\n".join(lines)


# What follows runs in the ranks.


def _serve(
    connection: multiprocessing.connection.Connection,
    stack_file: str,
    queues: tuple[Any, bytes],
) -> None:
    """Run jobs until the pool closes the connection."""
    # Kept open for the life of the process: faulthandler writes to its descriptor.
    stacks = open(stack_file, "w")  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=stacks)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the pool's business
    torch.set_num_threads(1)
    _share_queues(*queues)
    connection.send_bytes(READY)
    while True:
        try:
            job = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        _run_job(connection, pickle.loads(job))


def _share_queues(address: Any, key: bytes) -> None:
    """Give megatron-core's checkpoint writer a queue of the pool's manager.

    It would start a manager of its own at the first save: a process that imports torch, for every rank.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    manager = multiprocessing.managers.SyncManager(address, key)
    manager.connect()
    assert hasattr(filesystem_async, "_results_queue"), "megatron-core keeps its queue elsewhere"
    filesystem_async._results_queue = manager.Queue()


def _run_job(connection: multiprocessing.connection.Connection, job: Job) -> None:
    """Answer one job: the result or a `Failure`; then (None or what keeps it from being clean, threads)."""
    # Before the call is unpickled: its function may live in a module of a test directory.
    sys.path.extend(entry for entry in job.path if entry not in sys.path)
    tiers.choose(job.parts)  # sizes that grow with the tier are those of the test
    environment = dict(os.environ)
    rank = str(job.rank)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port)}
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(job.world_size), **place)
    random.seed(0)
    torch.manual_seed(0)
    try:
        function, args, kwargs = pickle.loads(job.call)
        # Longer than the pool waits, so that a hang is the pool's to report.
        timeout = datetime.timedelta(seconds=job.timeout + START_SECONDS)
        store = torch.distributed.TCPStore("127.0.0.1", job.port, job.world_size, timeout=timeout)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=job.rank, world_size=job.world_size, timeout=timeout
        )
        answer = pickle.dumps((function(*args, **kwargs),))
        failed = False
    except BaseException:  # pytest's own exceptions derive from BaseException
        answer = pickle.dumps(Failure(job.rank, time.monotonic(), traceback.format_exc()))
        failed = True
    connection.send_bytes(answer)
    if not failed:
        connection.recv_bytes()
    problem = None
    try:
        _tear_down()
    except Exception:
        problem = traceback.format_exc()
    os.environ.clear()
    os.environ.update(environment)
    connection.send_bytes(pickle.dumps((problem, psutil.Process().num_threads())))


def _tear_down() -> None:
    """Put the process back into the state in which the next test expects it.

    Only modules that the test has imported are touched. The groups go last: the others use them.
    """
    for module_name, function in TEAR_DOWN:
        destroy = getattr(sys.modules.get(module_name), function, None)
        if destroy is not None:
            destroy()
    tracker = sys.modules.get("megatron.core.tensor_parallel.random")
    if tracker is not None:
        vars(tracker).update(
            _CUDA_RNG_STATE_TRACKER=None, _CUDA_RNG_STATE_TRACKER_INITIALIZED=False
        )
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None:
        moe.get_moe_layer_wise_logging_tracker().clear()
        moe.MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of any shape after DeepSpeed
    rotary = sys.modules.get("megatron.core.models.common.embeddings.rotary_pos_embedding")
    if rotary is not None:
        rotary.RotaryEmbedding.forward.cache_clear()  # it keeps models, and they their groups
    wrapper = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if wrapper is not None:
        # The distributed optimizer's views of parameters, and through their graph the wrapper's hooks, make a
        # circle with the wrapper that Python's collector does not see. It keeps the model and its groups.
        for value in gc.get_objects():
            if type(value) is wrapper.DistributedDataParallel:
                vars(value).clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    gc.collect()  # models refer to themselves; sixteen ranks must not keep the last test's
