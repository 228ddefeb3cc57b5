"""megatron-core's named random states, on the CPU generator.

On a GPU megatron-core keeps one state per kind of region (data, model and expert parallel) for the CUDA
generator, and leaves the CPU generator alone. Without a GPU dropout draws from the CPU generator, so the
same states are kept for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.random import (
    _MODEL_PARALLEL_RNG_TRACKER_NAME,
    CudaRNGStatesTracker,
)

_DEFAULT_STATE = "default-rng"  # upstream's name for "outside of every fork": it is not in states_


class CpuRNGStatesTracker(CudaRNGStatesTracker):
    """`CudaRNGStatesTracker` whose forks switch the CPU generator.

    Upstream's `add`, `get_states`, `set_states` and `reset` serve as they are, on the functions that
    `cpu_runtime` puts into `torch.cuda`. Its `fork` does not: it reports every draw from the CPU
    generator inside a fork as a mistake.
    """

    _current_state_name: str  # upstream's attribute; mypy does not see upstream

    @contextlib.contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draw from the named state inside the block.

        Forks nest: an inner fork of the same state continues it, and the outer one continues where the
        inner ended. Raises `KeyError` for a name that was not added.
        """
        if name not in self.states_:
            known = ", ".join(self.states_) or "none"
            raise KeyError(f"The random state {name} was not added. States: {known}.")
        outer_name, outer_state = self._current_state_name, torch.get_rng_state()
        if outer_name != _DEFAULT_STATE:
            self.states_[outer_name] = outer_state
        torch.set_rng_state(self.states_[name])
        self._current_state_name = name
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            if outer_name != _DEFAULT_STATE:
                outer_state = self.states_[outer_name]
            torch.set_rng_state(outer_state)
            self._current_state_name = outer_name
