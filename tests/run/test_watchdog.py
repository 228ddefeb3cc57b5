"""When a rank dies or hangs in the middle of training, every other rank ends and says which and where."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from pool import RankError
from tiers import sized
from waiting import PROGRAM_LIMIT, wait_until

from helix_megatron.checkpoint.manifest import verify
from helix_megatron.checkpoint.store import Store
from helix_megatron.run import watchdog
from helix_megatron.run.local_ranks import reserved_port

ROOT = Path(__file__).parents[2]
RANKS = sized("training", full=4, quick=2)
SMALL = "--num-layers 2 --hidden-size 32 --seq-length 32 --train-iters 100000 --log-interval 1"
LAYOUT = f"--tensor-model-parallel-size {RANKS} --intra-head-parallel-size 2"


@pytest.fixture
def run(tmp_path):
    """Ranks in the middle of training, without a launcher that would end them: (processes, files)."""
    with ranks_of_a_run(tmp_path) as run:
        yield run


@contextlib.contextmanager
def ranks_of_a_run(tmp_path, *flags, timeout_minutes=60):
    outputs = [tmp_path / f"rank{rank}" for rank in range(RANKS)]
    metrics = tmp_path / "metrics.jsonl"
    processes = []
    with reserved_port() as port:
        for rank, output in enumerate(outputs):
            environment = dict(os.environ) | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            timeout = ["--distributed-timeout-minutes", str(timeout_minutes)]
            timeout += ["--metrics-jsonl", str(metrics)]
            command = [
                sys.executable,
                str(ROOT / "scripts" / "pretrain_gpt.py"),
                *SMALL.split(),
                *LAYOUT.split(),
            ]
            command += [*timeout, *flags]
            with output.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env=environment
                    )
                )

        def under_way() -> bool:
            assert all(process.poll() is None for process in processes), outputs[0].read_text()
            return metrics.exists() and len(metrics.read_text().splitlines()) >= 3

        try:
            wait_until(under_way, "three iterations are over", PROGRAM_LIMIT)
            yield processes, outputs
        finally:
            for process in processes:
                process.kill()
                process.wait()


def ends(processes: list[subprocess.Popen], victim: int) -> None:
    for rank, process in enumerate(processes):
        if rank != victim:
            status = process.wait(timeout=PROGRAM_LIMIT)
            assert status != 0, f"rank {rank} ended as if all were well"


@pytest.mark.parametrize(
    "victim", [0, pytest.param(RANKS // 2, marks=pytest.mark.full("training"))]
)
def test_a_killed_rank_ends_the_others_with_its_name_and_the_collective(run, victim):
    """Nobody should wait for a dead rank, an hour in this case, nor guess which it was."""
    processes, outputs = run
    processes[victim].send_signal(signal.SIGKILL)
    ends(processes, victim)
    for rank, output in enumerate(outputs):
        if rank == victim:
            continue
        text = re.sub(r"\s+", " ", output.read_text())
        assert f"rank {rank} ends: " in text
        assert re.search(r"Its last collective: [a-z-]+ \(.+?\) among ranks \[", text), text
        assert f"Rank {victim} (process {processes[victim].pid}" in text, text


@pytest.mark.full("training")
def test_a_stopped_rank_of_a_run_is_found_out_by_the_timeout(tmp_path):
    """The whole program. Its timeout holds from the start: long enough for ranks that start one by one."""
    last = RANKS - 1
    with ranks_of_a_run(tmp_path, timeout_minutes=2) as (processes, outputs):
        psutil.Process(processes[last].pid).suspend()
        try:
            ends(processes, last)
        finally:
            psutil.Process(processes[last].pid).resume()
    text = re.sub(r"\s+", " ", "".join(output.read_text() for output in outputs[:last]))
    assert "a collective failed" in text
    assert re.search(
        rf"Rank {last} \(process \d+ on \S+\) has been silent for \d+ s; its last", text
    )


def stop_before_a_collective(seconds: float) -> str:
    """Rank 1 stops itself as SIGSTOP does; what rank 0 says when its collective has timed out."""
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=seconds))
    dist.all_reduce(torch.ones(1), group=group)  # connects
    processes: list[Any] = [None, None]
    dist.all_gather_object(processes, os.getpid())
    said: list[str] = []
    handler = signal.getsignal(signal.SIGTERM)
    # In the pool's process the end of a process is an exception.
    with (
        unittest.mock.patch.object(watchdog.os, "_exit", leave),
        contextlib.suppress(Left),
        watchdog.watching(farewell=said.append),
    ):
        dist.barrier()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            dist.all_reduce(torch.ones(1), group=group)
    if dist.get_rank() == 0:
        os.kill(processes[1], signal.SIGCONT)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, handler)
    return "".join(said)


class Left(BaseException):
    """In place of the end of a process."""


def leave(status: int) -> None:
    raise Left


def test_a_stopped_rank_is_found_out_by_the_timeout(pool):
    """A rank that hangs is alive: the collective's timeout ends the others, who say where it is."""
    for seconds in (8, 80, 200):  # a slow machine needs more than the first
        try:
            text = pool.run(stop_before_a_collective, seconds, world_size=2)[0]
        except RankError as error:
            text = str(error)
        if "a collective failed" in text and "Rank 1" in text and "silent" in text:
            break
    assert "a collective failed" in text
    assert re.search(r"Rank 1 \(process \d+ on \S+\) has been silent for \d+ s; its last", text), (
        text
    )


def test_a_launcher_that_terminates_gets_a_word_too(run):
    """On SIGTERM a rank says what it was doing, even when it is blocked inside a collective."""
    processes, outputs = run
    metrics = outputs[0].with_name("metrics.jsonl")
    asked = RANKS - 2
    psutil.Process(processes[-1].pid).suspend()  # the others block on it

    def stands() -> bool:
        size = metrics.stat().st_size
        time.sleep(2)
        return metrics.stat().st_size == size

    wait_until(stands, "no iteration ends any more")
    processes[asked].send_signal(signal.SIGTERM)
    assert processes[asked].wait(timeout=PROGRAM_LIMIT) == 128 + signal.SIGTERM
    assert f"rank {asked} ends: it was asked to terminate. Its last collective: " in re.sub(
        r"\s+", " ", outputs[asked].read_text()
    )


def test_a_run_that_is_asked_to_end_saves_first(tmp_path):
    """With --exit-signal-handler a SIGTERM to one rank makes all of them save, and end as if all were well."""
    store = Store(tmp_path / "store")
    flags = ("--exit-signal-handler", "--save", str(store.root))
    with ranks_of_a_run(tmp_path, *flags) as (processes, outputs):
        processes[-1].send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(timeout=PROGRAM_LIMIT) == 0, outputs[0].read_text()
    assert verify(store.resolve()).iteration == store.latest()
    assert f"saved {store.resolve()}" in outputs[0].read_text()
