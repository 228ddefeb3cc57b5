"""Saves checkpoints in a forked process and kills it at random moments. Started by test_kill_saves.py.

    python tests/kill_saves.py DIRECTORY KILLS SEED [--async-save]

One process imports everything once; each trial forks a child that saves iteration after iteration until it is
killed. Prints one JSON object: for each kill, what a reader found then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as megatron_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from waiting import wait_until

from helix_megatron.checkpoint.manifest import Manifest, verify
from helix_megatron.checkpoint.store import Store
from helix_megatron.megatron import cpu_runtime
from helix_megatron.megatron.dist_checkpoint import CheckpointSaver

SIZE = 200_000


def saves(directory: str, asynchronous: bool) -> None:
    """Save iterations, from the newest complete one on, until killed. The tensor tells the iteration."""
    os.setsid()  # so that the writers forked by the save die with it
    cpu_runtime.install()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    megatron_state.initialize_model_parallel()
    store = Store(directory)
    saver = CheckpointSaver(store, asynchronous=asynchronous)
    iteration = store.latest() or 0
    while True:
        iteration += 1
        tensor = torch.full((SIZE,), float(iteration))
        state = {
            "model": {"weight": ShardedTensor.from_rank_offsets("weight", tensor)},
            "iteration": iteration,
        }
        saver.save(iteration, state, Manifest(kind="canonical", model={}, iteration=iteration))
        store.try_to_prune(2)
        report(directory, iteration)
        if asynchronous:
            time.sleep(0.01)


def report(directory: str, iteration: int) -> None:
    """Say that a save has returned; the kill may fall into this, too."""
    new = Path(directory) / "saved.new"
    new.write_text(str(iteration))
    new.rename(Path(directory) / "saved")


def found(directory: str) -> int:
    """The iteration that a reader gets, verified; its tensor must hold that number throughout."""
    from torch.distributed.checkpoint import FileSystemReader, load

    path = Store(directory).resolve()
    manifest = verify(path)
    tensors = {"weight": torch.zeros(SIZE)}
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    assert manifest.iteration is not None
    assert bool((tensors["weight"] == manifest.iteration).all())
    return manifest.iteration


def main() -> None:
    directory, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    asynchronous = "--async-save" in sys.argv
    # Its server process outlives the children; megatron-core 0.19 has renamed the function.
    name = "get_write_results_queue"
    (getattr(filesystem_async, name, None) or getattr(filesystem_async, f"_{name}"))()
    generator = random.Random(seed)
    trials: list[dict[str, object]] = []
    before = 0
    report(directory, before)
    while len(trials) < kills:
        child = os.fork()
        if child == 0:
            saves(directory, asynchronous)
        wait_for_save(directory, before, child)
        time.sleep(generator.uniform(0, 0.6))
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        reported = max(before, int((Path(directory) / "saved").read_text()))
        after = found(directory)
        trials.append(
            {
                "killed": os.WIFSIGNALED(status),
                "before": before,
                "reported": reported,
                "found": after,
                "left": sorted(
                    path.name
                    for path in Path(directory).iterdir()
                    if not path.name.startswith("saved")
                ),
            }
        )
        before = after
    print(json.dumps(trials))


def wait_for_save(directory: str, before: int, child: int) -> None:
    """Until the child has saved once, so that kills fall into saves and not into its start."""

    def has_saved() -> bool:
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the saving process ended by itself")
        return (Store(directory).latest() or 0) > before

    wait_until(has_saved, "the child has saved")


if __name__ == "__main__":
    main()
