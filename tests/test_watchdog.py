"""When a rank dies or hangs in the middle of training, every other rank ends and says which and where."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helix_megatron.checkpoint.manifest import verify
from helix_megatron.checkpoint.store import Store
from helix_megatron.local_ranks import free_port

ROOT = Path(__file__).parent.parent
LIMIT = 60.0
SMALL = "--num-layers 2 --hidden-size 32 --seq-length 32 --train-iters 100000 --log-interval 1"
LAYOUT = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2"


@pytest.fixture
def run(tmp_path):
    """Four ranks in the middle of training, without a launcher that would end them: (processes, files)."""
    with four_ranks(tmp_path) as run:
        yield run


@contextlib.contextmanager
def four_ranks(tmp_path, *flags):
    port = free_port()
    outputs = [tmp_path / f"rank{rank}" for rank in range(4)]
    metrics = tmp_path / "metrics.jsonl"
    processes = []
    for rank, output in enumerate(outputs):
        environment = dict(os.environ) | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        timeout = ["--distributed-timeout-minutes", "0.25", "--metrics-jsonl", str(metrics)]
        command = [
            sys.executable,
            str(ROOT / "scripts" / "pretrain_gpt.py"),
            *SMALL.split(),
            *LAYOUT.split(),
        ]
        command += [*timeout, *flags]
        with output.open("w") as file:
            processes.append(
                subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            )
    try:
        deadline = time.monotonic() + 2 * LIMIT
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline, outputs[0].read_text()
            assert all(process.poll() is None for process in processes), outputs[0].read_text()
            time.sleep(0.1)
        yield processes, outputs
    finally:
        for process in processes:
            process.kill()
            process.wait()


def ends(processes: list[subprocess.Popen], victim: int) -> None:
    deadline = time.monotonic() + LIMIT
    for rank, process in enumerate(processes):
        if rank != victim:
            status = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            assert status != 0, f"rank {rank} ended as if all were well"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_ends_the_others_with_its_name_and_the_collective(run, victim):
    """Nobody should wait for a dead rank, nor guess which it was."""
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


def test_a_stopped_rank_is_found_out_by_the_timeout(run):
    """A rank that hangs is alive: the collective's timeout ends the others, who say where it is."""
    processes, outputs = run
    psutil.Process(processes[3].pid).suspend()
    try:
        ends(processes, 3)
    finally:
        psutil.Process(processes[3].pid).resume()
    text = re.sub(r"\s+", " ", "".join(output.read_text() for output in outputs[:3]))
    assert "a collective failed" in text
    assert re.search(r"Rank 3 \(process \d+ on \S+\) has been silent for \d+ s; its last", text), (
        text
    )


def test_a_launcher_that_terminates_gets_a_word_too(run):
    """On SIGTERM a rank says what it was doing, even when it is blocked inside a collective."""
    processes, outputs = run
    psutil.Process(processes[3].pid).suspend()  # the others block on it
    time.sleep(2)
    processes[1].send_signal(signal.SIGTERM)
    assert processes[1].wait(timeout=LIMIT) == 128 + signal.SIGTERM
    assert "rank 1 ends: it was asked to terminate. Its last collective: " in re.sub(
        r"\s+", " ", outputs[1].read_text()
    )


def test_a_run_that_is_asked_to_end_saves_first(tmp_path):
    """With --exit-signal-handler a SIGTERM to one rank makes all of them save, and end as if all were well."""
    store = Store(tmp_path / "store")
    flags = ("--exit-signal-handler", "--save", str(store.root))
    with four_ranks(tmp_path, *flags) as (processes, outputs):
        processes[2].send_signal(signal.SIGTERM)
        for process in processes:
            assert process.wait(timeout=LIMIT) == 0, outputs[0].read_text()
    assert verify(store.resolve()).iteration == store.latest()
    assert f"saved {store.resolve()}" in outputs[0].read_text()
