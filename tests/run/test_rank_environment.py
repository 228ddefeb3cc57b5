"""Which rank a process is: launchers, batch systems, and what is refused before anybody waits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from waiting import PROGRAM_LIMIT, wait_until

from helix_megatron.arguments import exit_on_error
from helix_megatron.checkpoint.manifest import read_manifest
from helix_megatron.checkpoint.store import Store
from helix_megatron.errors import LaunchError
from helix_megatron.run.local_ranks import reserved_port, supervised, wait_for
from helix_megatron.run.rank_environment import BATCH_SYSTEMS, launched_ranks, number_of_ranks

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "scripts" / "pretrain_gpt.py"
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment that no launcher has touched; all are put back afterwards."""
    systems = ("SLURM_", "OMPI_", "PMI_", "MPI_LOCAL")
    for name in (*NAMES, *(name for name in os.environ if name.startswith(systems))):
        monkeypatch.setenv(name, "")  # so that what the code sets is removed, too
        monkeypatch.delenv(name)

    def set_variables(text: str) -> None:
        for assignment in text.split():
            name, value = assignment.split("=")
            monkeypatch.setenv(name, value)

    return set_variables


FAULTS = {
    "WORLD_SIZE=2": "WORLD_SIZE is 2 and RANK is not set, so that this process cannot know which rank it is.",
    "WORLD_SIZE=two": "WORLD_SIZE is 'two', which is no whole number.",
    "RANK=1 WORLD_SIZE=1": "RANK is 1 and WORLD_SIZE is 1. Valid ranks: 0 to 0.",
    "RANK=1": "RANK is 1 and WORLD_SIZE is not set.",
    "RANK=x WORLD_SIZE=2": "RANK is 'x', which is no whole number.",
    "RANK=1 WORLD_SIZE=2": "RANK is 1 of 2 and MASTER_ADDR is not set, so that the ranks cannot",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a": "RANK is 1 of 2 and MASTER_PORT is not set",
    "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NNODES=2": (
        "srun has started 4 ranks on several nodes, and MASTER_ADDR is not set"
    ),
    "PMI_RANK=1 PMI_SIZE=2": "mpiexec has started 2 ranks on several nodes, and MASTER_ADDR is not set",
    "SLURM_PROCID=1 SLURM_NTASKS=many": "SLURM_NTASKS is 'many', which is no whole number.",
}


@pytest.mark.parametrize("variables", FAULTS)
def test_a_faulty_environment_is_a_sentence_on_every_rank(environment, variables, capsys):
    """Ranks that do not know of each other train on parts of a batch in silence, or wait until a timeout."""
    environment(variables)
    with pytest.raises(SystemExit) as ended, exit_on_error("helix"):
        launched_ranks()
    assert ended.value.code == 2
    assert FAULTS[variables] in " ".join(capsys.readouterr().err.split())


TRANSLATED = {
    # Slurm, Open MPI and Hydra on one node; on several the address has to be given.
    "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=3": "3 4 3 127.0.0.1 29500",
    "SLURM_JOB_ID=2017 SLURM_STEP_ID=0 SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=3 SLURM_NNODES=1": (
        "3 4 3 127.0.0.1 29517"
    ),
    "SLURM_PROCID=3 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_NNODES=2 MASTER_ADDR=n1": "3 4 1 n1 29500",
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 "
    "OMPI_COMM_WORLD_LOCAL_SIZE=2": "1 2 1 127.0.0.1 29500",
    "PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2 MASTER_PORT=7": "1 2 1 127.0.0.1 7",
}


@pytest.mark.parametrize("variables", TRANSLATED)
def test_batch_systems_are_understood(environment, variables):
    """`srun -n 4` would otherwise start four single runs that write over each other's files."""
    environment(variables)
    rank, size, *others = TRANSLATED[variables].split()
    assert launched_ranks() == number_of_ranks(None) == int(size)
    names = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", *names)] == [rank, size, *others]


def test_a_single_process_stays_one(environment):
    """One task, and a batch script that will start ranks itself, are no ranks of a world."""
    for variables in (
        "WORLD_SIZE=1",
        "SLURM_PROCID=0 SLURM_NTASKS=1",
        "SLURM_JOB_ID=5 SLURM_PROCID=0 SLURM_NTASKS=4",
    ):
        environment(variables)
        assert launched_ranks() is None
        assert number_of_ranks(None) == 1
        assert number_of_ranks(4) == 4
    assert {system.launcher for system in BATCH_SYSTEMS} == {"srun", "mpirun", "mpiexec"}


def test_ranks_are_started_once(environment):
    """A launcher and --nproc-per-node together would start n² processes, unless they mean the same ranks."""
    environment("RANK=0 WORLD_SIZE=4 MASTER_ADDR=a MASTER_PORT=1")
    assert number_of_ranks(4) == 4
    with pytest.raises(
        LaunchError, match="--nproc-per-node 2 starts ranks, and a launcher has started 4"
    ):
        number_of_ranks(2)
    with pytest.raises(LaunchError, match="of at least 1"):
        number_of_ranks(0)
    environment("WORLD_SIZE=16")
    os.environ.pop("RANK")
    assert number_of_ranks(None, starts=False) == 16  # a run that is only looked at


def test_ctrl_c_ends_a_run_with_one_line(tmp_path):
    """No tracebacks of eight ranks, and no rank that goes on in the background."""
    metrics = tmp_path / "metrics.jsonl"
    flags = (
        "--num-layers 2 --hidden-size 32 --seq-length 32 --train-iters 100000 --log-interval 100000"
    )
    command = [sys.executable, str(PROGRAM), *flags.split(), "--nproc-per-node", "2"]
    command += ["--tensor-model-parallel-size", "2", "--metrics-jsonl", str(metrics)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:

            def under_way() -> bool:
                assert run.poll() is None, run.communicate()[1]
                return metrics.exists() and len(metrics.read_text().splitlines()) >= 2

            wait_until(under_way, "two iterations are over", PROGRAM_LIMIT)
            ranks = psutil.Process(run.pid).children(recursive=True)
            assert len(ranks) >= 2
            run.send_signal(signal.SIGINT)
            _, printed = run.communicate(timeout=PROGRAM_LIMIT)
        finally:
            run.kill()
    assert run.returncode == 128 + signal.SIGINT
    assert printed.splitlines()[-1] == "pretrain_gpt.py: interrupted"
    assert not re.search(r"Traceback|rank \d", printed), printed
    _, alive = psutil.wait_procs(ranks, timeout=0)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --micro-batch-size 1 "
    "--global-batch-size 4 --train-iters 2 --log-interval 1 --save-interval 2"
)


def tasks(directory: Path, flags: str, variables: dict[str, str]) -> list[tuple[int, str, str]]:
    """Four tasks as srun starts them: (status, standard output, standard error) of each, by SLURM_PROCID."""
    common = {k: v for k, v in os.environ.items() if k not in NAMES and "SLURM" not in k}
    command = [
        sys.executable,
        str(PROGRAM),
        *SMALL.split(),
        *flags.split(),
        "--save",
        str(directory),
    ]
    started = [
        subprocess.Popen(
            command,
            env=common | variables | {"SLURM_NTASKS": "4", "SLURM_PROCID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(4)
    ]
    try:
        printed = [task.communicate(timeout=PROGRAM_LIMIT) for task in started]
    finally:
        for task in started:
            task.kill()
    return [(task.returncode, *texts) for task, texts in zip(started, printed, strict=True)]


@pytest.mark.full("training")
def test_four_tasks_of_srun_are_one_run(tmp_path):
    """They were four trainings of one rank that wrote over each other's checkpoints, with exit 0."""
    with reserved_port() as port:
        node = {"SLURM_NNODES": "1", "MASTER_PORT": str(port)}
        ended = tasks(tmp_path, "--tensor-model-parallel-size 2 --intra-head-parallel-size 2", node)
    assert [status for status, *_ in ended] == [0] * 4, ended
    assert not any(printed for _, printed, _ in ended[1:]), "the first rank speaks for all"
    assert "iteration" in ended[0][1]
    assert Store(tmp_path).complete() == [2]
    layout = read_manifest(Store(tmp_path).resolve()).layout
    assert (layout["tp"], layout["dp"], layout["m"]) == (2, 2, 2)


def test_tasks_of_srun_that_cannot_be_one_run_are_refused(tmp_path):
    """By every rank, since the others may be on other machines, and nothing is written."""
    ended = tasks(tmp_path / "run", "", {"SLURM_NNODES": "2", "SLURM_LOCALID": "0"})
    for status, _, printed in ended:
        assert status == 2
        assert "MASTER_ADDR is not set" in " ".join(printed.split())
        assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_reserved_port_is_for_the_ranks_alone():
    """Between the choice of a port and the start of rank 0 lie seconds, in which others ask for ports, too."""
    with reserved_port() as port, contextlib.ExitStack() as others:
        with pytest.raises(OSError, match="in use"):
            others.enter_context(socket.socket()).bind(("127.0.0.1", port))
        for _ in range(200):
            other = others.enter_context(socket.socket())
            other.bind(("127.0.0.1", 0))
            assert other.getsockname()[1] != port
        store = dist.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("rank 0", "listens")
        assert store.get("rank 0") == b"listens"


class RankThatEndsBetween:
    """A rank that has ended after it was asked whether it has: its number means no process any more."""

    def __init__(self) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            self.pid = process.pid
        self.answers = iter([None, None, 0])

    def poll(self) -> int | None:
        return next(self.answers, 0)


def test_a_rank_that_ends_while_others_are_waited_for_is_no_error():
    """Ranks of a benchmark are forked by another process, which frees their numbers as they end."""
    first, late = RankThatEndsBetween(), RankThatEndsBetween()
    first.answers = iter([0])
    with supervised([first, late]):
        assert wait_for([first, late]) == 0
    assert next(late.answers, "asked") == "asked"
