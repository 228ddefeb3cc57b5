"""Two runs that save to one directory overwrite each other: the second is refused while the first lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from pool import RankError
from training_runs import BASE, run

from helix_megatron.checkpoint.run_lock import LOCK, sole_run
from helix_megatron.errors import HelixError

HOLD = """
import os, sys, time
from pathlib import Path
from helix_megatron.checkpoint.run_lock import sole_run
with sole_run(Path(sys.argv[1])):
    if os.fork() == 0:
        print("held", flush=True)  # by the parent; the child has closed what it got
        time.sleep(60)  # a background save
        os._exit(0)
    sys.stdin.read()
"""


def test_the_lock_lives_as_long_as_its_process(tmp_path):
    """A run that was killed must not block the one that takes its place, nor must the writer it forked."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        text = rf"another run saves to {tmp_path}: process {holder.pid} on .*nproc_per_node"
        with pytest.raises(HelixError, match=text), sole_run(tmp_path):
            pass
        holder.kill()
        holder.wait()
        with sole_run(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
    assert os.listdir(tmp_path) == [], "a run that ends well leaves nothing"


def test_a_second_run_is_refused_before_it_trains(pool, tmp_path):
    """On every rank, with the same sentence; and it may begin once the first has ended."""
    flags = f"{BASE} --tensor-model-parallel-size 2 --save {tmp_path}"
    with sole_run(tmp_path), pytest.raises(RankError, match="another run saves to") as caught:
        run(pool, flags, 2)
    assert "Rank 0 raised" in str(caught.value)
    assert "Rank 1 raised" in str(caught.value)
    assert len(run(pool, flags, 2)) == 2
    assert LOCK not in os.listdir(tmp_path)


def outcome_of_a_fault(of: str) -> str:
    from helix_megatron.run import outcomes

    def fail() -> None:
        if of == "on_first_rank" or dist.get_rank() == 0:
            Path("/no/such/file").read_bytes()

    try:
        getattr(outcomes, of)(fail)
    except (OSError, HelixError) as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize(
    ("of", "who"), [("on_first_rank", "the first rank"), ("on_every_rank", "rank 0")]
)
def test_a_fault_of_one_rank_ends_every_rank(pool, of, who):
    """An exception that nobody foresaw must not leave the others in a collective until its timeout."""
    first, second = pool.run(outcome_of_a_fault, of, world_size=2)
    assert first.startswith("[Errno 2]")
    assert second.startswith(f"{who} failed: FileNotFoundError: [Errno 2]")
