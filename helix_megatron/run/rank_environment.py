"""Which rank this process is: what a launcher or a batch system says of it, checked before anybody waits.

torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. What srun and MPI's launchers say in
variables of their own is translated into those.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import LaunchError

Environment = MutableMapping[str, str]
DEFAULT_PORT = 29500
MOST_RANKS = 4096  # of one machine


@dataclass(frozen=True)
class BatchSystem:
    """The variables in which a launcher of parallel programs tells a process its place.

    one_node: variables that count nodes (Slurm) or the ranks of this node (MPI); the first that is set holds.
    """

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    one_node: tuple[str, ...]
    counts_nodes: bool = False

    def is_on_one_node(self, environment: Environment, rank: int, size: int) -> bool:
        """Whether all ranks run on this machine, as far as the variables tell."""
        for name in self.one_node:
            if name in environment:
                return _number(environment, name) == (1 if self.counts_nodes else size)
        local = self.local_rank_of(environment)
        return local is not None and local == rank

    def local_rank_of(self, environment: Environment) -> int | None:
        """This rank's place on its node; None where the launcher does not say."""
        name = next((name for name in self.local_rank if name in environment), None)
        return None if name is None else _number(environment, name)


BATCH_SYSTEMS = (
    BatchSystem(
        "srun",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        ("SLURM_LOCALID",),
        ("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
        counts_nodes=True,
    ),
    BatchSystem(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    BatchSystem(
        "mpiexec",
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
)


def launched_ranks() -> int | None:
    """How many ranks a launcher has started, this process being one of them; None without a launcher.

    Afterwards the environment has torchrun's variables, whichever launcher it was.

    Raises:
        LaunchError: the variables contradict each other, or lack what ranks need to find each other.
    """
    environment = os.environ
    if "RANK" not in environment:
        _take_from_batch_system(environment)
    size = _number(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else None
    if "RANK" not in environment:
        if size is not None and size > 1:
            raise LaunchError(
                f"WORLD_SIZE is {size} and RANK is not set, so that this process cannot know which rank it is. "
                "Start the ranks with torchrun or with --nproc-per-node, or unset WORLD_SIZE."
            )
        return None
    rank = _number(environment, "RANK")
    if size is None:
        raise LaunchError(
            f"RANK is {rank} and WORLD_SIZE is not set. Start the ranks with torchrun, or unset RANK."
        )
    if not 0 <= rank < size:
        raise LaunchError(
            f"RANK is {rank} and WORLD_SIZE is {size}. Valid ranks: 0 to {size - 1}. Start the ranks with "
            "torchrun, or unset both for a single process."
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if size > 1 and not environment.get(name):
            raise LaunchError(
                f"RANK is {rank} of {size} and {name} is not set, so that the ranks cannot find each other. "
                "Start them with torchrun, or set MASTER_ADDR and MASTER_PORT to where rank 0 listens."
            )
    return size


def number_of_ranks(asked: int | None, *, starts: bool = True) -> int:
    """The ranks of a run: a launcher's, those that are asked for on this machine, or 1.

    Args:
        asked: of `--nproc-per-node`.
        starts: False where a run is only looked at; then WORLD_SIZE alone says for how many ranks.

    Raises:
        LaunchError: both a launcher and the flag start ranks, or the environment is faulty.
    """
    if asked is not None and not 1 <= asked <= MOST_RANKS:
        raise LaunchError(
            f"--nproc-per-node is {asked}. It must be a whole number of at least 1 and at most {MOST_RANKS}."
        )
    if not starts and asked is None and "RANK" not in os.environ and "WORLD_SIZE" in os.environ:
        return _number(os.environ, "WORLD_SIZE")
    launched = launched_ranks()
    if launched is not None and asked not in (None, launched):
        raise LaunchError(
            f"--nproc-per-node {asked} starts ranks, and a launcher has started {launched} already. Leave it "
            "out under a launcher."
        )
    return launched or asked or 1


def rendezvous() -> dict[str, Any]:
    """What `torch.distributed.init_process_group` must be told besides the environment.

    A single process needs no launcher: it gets a store of its own, and the environment of rank 0 of 1.
    """
    import torch.distributed as dist

    if os.environ.get("WORLD_SIZE", "1") != "1":
        return {}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    os.environ.setdefault("LOCAL_RANK", "0")
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def _take_from_batch_system(environment: Environment) -> None:
    """Set torchrun's variables from those of the batch system that has started this process, if one has."""
    for system in BATCH_SYSTEMS:
        if system.rank in environment and system.size in environment:
            break
    else:
        return
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment and system.counts_nodes:
        return  # the batch script itself, which is one process
    rank, size = _number(environment, system.rank), _number(environment, system.size)
    if size == 1:
        return
    found = {"RANK": str(rank), "WORLD_SIZE": str(size)}
    local = system.local_rank_of(environment)
    if local is not None:
        found["LOCAL_RANK"] = str(local)
    if not environment.get("MASTER_ADDR"):
        if not system.is_on_one_node(environment, rank, size):
            raise LaunchError(
                f"{system.launcher} has started {size} ranks on several nodes, and MASTER_ADDR is not set, so "
                "that they cannot find each other. Set it to the host name of the first node before "
                f"{system.launcher}."
            )
        found |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(size)}
    if not environment.get("MASTER_PORT"):
        # Equal on all ranks, and another for another job of the same node.
        job = environment.get("SLURM_JOB_ID", "0")
        found["MASTER_PORT"] = str(DEFAULT_PORT + (int(job) % 1000 if job.isdigit() else 0))
    environment.update(found)


def _number(environment: Environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise LaunchError(
            f"{name} is {environment[name]!r}, which is no whole number. Start the ranks with torchrun, or "
            f"unset {name}."
        ) from None
