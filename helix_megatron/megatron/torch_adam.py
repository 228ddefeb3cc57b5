"""Two faults of megatron-core's distributed optimizer that appear with torch's Adam.

They show when neither apex nor Transformer Engine is installed, with or without a GPU, and only when a
checkpoint is loaded. `install` repairs them. File and line are those of megatron/core in 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch

from helix_megatron.patching import PatchTable

TABLE = PatchTable("megatron-core", "the repair of the distributed optimizer with torch's Adam")
_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"


def install() -> bool:
    """Repair `DistributedOptimizer`; idempotent.

    Returns whether the repair is in place: False where megatron-core uses the Adam of apex or of
    Transformer Engine, which does not need it. Raises `HelixError` for a megatron-core that lacks what
    is to be repaired.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    TABLE.install()
    return True


def uninstall() -> None:
    """Put upstream's methods back."""
    TABLE.uninstall()


def _allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give a fresh Adam the state that its first step would create: zeros, at step 0."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }


@TABLE.replace(f"{_OPTIMIZER}.state_dict")
def _state_dict_before_the_first_step(upstream: Any) -> Any:
    """distrib_optimizer.py:642 asserts that the parameters agree on one step.

    Loading asks a fresh optimizer for its state, to learn what to read, and a fresh torch Adam has none:
    the set of steps is empty, `AssertionError`.
    """

    def state_dict(self: Any) -> Any:
        if isinstance(self.optimizer, torch.optim.Adam):
            _allocate(self.optimizer)
        return upstream(self)

    return state_dict


@TABLE.replace(f"{_OPTIMIZER}._set_main_param_and_optimizer_states")
def _keep_the_step(upstream: Any) -> Any:
    """distrib_optimizer.py:940 copies every tensor of Adam's state from the checkpoint.

    The `fully_reshardable` format stores the step once, with the parameter groups, and not per
    parameter: `KeyError: 'step'`. `load_state_dict` has set the step already, so it is kept.
    """

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        if "step" in state:
            tensors = {"step": state["step"], **tensors}
        upstream(self, model_param, tensors)

    return set_states


@TABLE.replace(f"{_OPTIMIZER}.load_state_dict")
def _one_step_per_parameter(upstream: Any) -> Any:
    """distrib_optimizer.py:821-826 gives all parameters the same step tensor.

    Each parameter's update increments it in place, so after a resume the step grows by the number of
    parameters, and the bias correction of Adam is wrong without any error.
    """

    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    return load_state_dict
