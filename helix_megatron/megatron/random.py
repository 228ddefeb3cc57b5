"""Random states of training: the same model and the same hidden dropout at every layout."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as megatron_state
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from helix_megatron import parallel_state
from helix_megatron.errors import HelixError, Setting

HEAD_GROUP_STATE = "helix-head-group-rng"
MICRO_BATCH_STATE = "helix-micro-batch-rng"


def seed_model_parallel(seed: int) -> None:
    """Seed python, numpy and torch, Megatron's tracked states, and two of our own.

    The head group's state is equal on the m ranks that hold the same attention probabilities. The micro-batch's
    identifies the micro-batch that is being computed, see `enter_micro_batch`.

    Raises:
        HelixError: the seed is not positive.
    """
    if seed < 1:
        raise HelixError(
            f"the seed {seed} is not a positive whole number, which Megatron needs.",
            setting="seed",
            value=seed,
            remedy=("Try ", Setting("seed", 1234), "."),
        )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    tracker = get_cuda_rng_tracker()
    head_group = 0
    if parallel_state.intra_head_parallel_is_initialized():
        head_group = parallel_state.get_head_group_parallel_rank()
    stage = megatron_state.get_pipeline_model_parallel_rank()
    tracker.add(HEAD_GROUP_STATE, derive_seed(seed, HEAD_GROUP_STATE, stage, head_group))
    tracker.add(MICRO_BATCH_STATE, derive_seed(seed, MICRO_BATCH_STATE))


def random_states() -> dict[str, Any]:
    """All random states of this rank, under the names that Megatron-LM's checkpoints have."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` gave. Tracked states that it lacks (Megatron's lacks ours) stay."""
    random.setstate(states["random_rng_state"])
    np.random.set_state(states["np_rng_state"])
    torch.set_rng_state(states["torch_rng_state"])
    torch.cuda.set_rng_state(states["cuda_rng_state"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states(tracker.get_states() | states["rng_tracker_states"])


def fork_head_group_state() -> contextlib.AbstractContextManager[None]:
    """The random state that the ranks of a head group share.

    Raises:
        HelixError: it was never seeded.
    """
    tracker = get_cuda_rng_tracker()
    if HEAD_GROUP_STATE not in tracker.get_states():
        raise HelixError(
            "attention dropout needs a random state that the ranks of a head group share. Call "
            "helix_megatron.megatron.random.seed_model_parallel(seed) after the groups are made."
        )
    return tracker.fork(HEAD_GROUP_STATE)


def enter_micro_batch(seed: int, iteration: int, index: int) -> None:
    """Say which micro-batch the next forward pass computes.

    `index` counts micro-batches of the global batch over all data parallel ranks. Megatron's recompute
    restores tracked states, so a recomputed forward pass finds the micro-batch that it belongs to.
    """
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    states.pop(MICRO_BATCH_STATE, None)
    tracker.set_states(states)
    value = derive_seed(seed, MICRO_BATCH_STATE, iteration, index)
    tracker.seeds_.discard(value)  # the tracker refuses to see a seed twice
    tracker.add(MICRO_BATCH_STATE, value)


def micro_batch_seed() -> int:
    """A number that identifies the micro-batch being computed, equal on all its ranks and stages."""
    with get_cuda_rng_tracker().fork(MICRO_BATCH_STATE):
        return torch.cuda.initial_seed() if torch.cuda.is_available() else torch.initial_seed()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on all the parts, the same in every process and Python version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's default CPU generator at a seed inside the block, and as before after it."""
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
