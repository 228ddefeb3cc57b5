"""The same seed gives the same model at every layout.

Each weight is drawn whole, in canonical order, from a generator seeded by its name, and each rank keeps its
part. The model's own `sharded_state_dict` says which part: the map that checkpoints use. So initial weights
depend on none of m, n, tensor, pipeline, expert or data parallel size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from helix_megatron.errors import HelixError
from helix_megatron.megatron.fill import own_part, sharded_weights
from helix_megatron.megatron.random import derive_seed, seeded

INIT_METHODS = ("init_method", "output_layer_init_method", "embedding_init_method")
OUTPUT_LAYERS = (
    "linear_proj.weight",
    "linear_fc2.weight",
    "out_proj.weight",
    "fc2_latent_proj.weight",
)

RECURRENT = ("A_log", "mixer.dt_bias")


@contextlib.contextmanager
def weights_not_drawn(config: Any) -> Iterator[None]:
    """Models built inside the block leave their weights undrawn, for `initialize_weights`.

    `perform_initialization=False` would not do: Megatron then also leaves out the marks that tell sharded
    parameters from replicated ones, and gradient norms come out wrong.
    """
    methods = {name: getattr(config, name) for name in INIT_METHODS if hasattr(config, name)}
    for name in methods:
        setattr(config, name, lambda weight: weight)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(config, name, method)


@torch.no_grad()
def initialize_weights(model: Any, config: Any, seed: int) -> None:
    """Draw every matrix of a model chunk, zero its biases and sinks; norms keep their constants.

    Gated delta nets and Mamba layers get what these draw by themselves: decays of 1 to 16, small convolutions,
    and Mamba's time steps of 0.001 to 0.1.

    Build the model in `weights_not_drawn`. Every rank draws each of its layers' weights whole, one at a time,
    on the CPU.

    Raises:
        HelixError: a weight whose place in the global tensor is unknown.
    """
    draw = _Draw(config, seed)
    drawn = set()
    for item in sharded_weights(model):
        if item.data.dim() > 1 or item.key.endswith(RECURRENT):
            item.data.copy_(own_part(item, draw))
            drawn.add(item.data.data_ptr())
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "softmax_offset")) and not name.endswith("dt_bias"):
            parameter.zero_()
        elif parameter.dim() > 1 and parameter.data_ptr() not in drawn:
            raise HelixError(
                f"weight {name} of shape {tuple(parameter.shape)} is not in the model's sharded state "
                "dictionary, so its initial value would depend on the layout."
            )


class _Draw:
    """Draws the global tensor of a name."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed = config, seed
        self._last: tuple[Any, Tensor] | None = None

    def __call__(self, key: str, place: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """fp32; `place` are the indices on leading axes (layer, expert) that `shape` leaves out."""
        if self._last is not None and self._last[0] == (key, place):
            return self._last[1]  # the two halves of a gated MLP are parts of one tensor
        value = torch.empty(shape)
        with seeded(derive_seed(self.seed, key, place)):
            self._method(key)(value)
        self._last = (key, place), value
        return value

    def _method(self, key: str) -> Callable[[Tensor], Any]:
        if key.endswith("A_log"):
            return lambda value: value.uniform_(1, 16).log_()
        if key.endswith("mixer.dt_bias"):
            return _draw_time_steps
        if ".conv1d.weight" in key:  # as torch draws it
            return lambda value: value.uniform_(-1, 1).mul_(value.shape[-1] ** -0.5)
        if key.endswith(OUTPUT_LAYERS):
            return self.config.output_layer_init_method
        if "embedding" in key:
            return getattr(self.config, "embedding_init_method", None) or self.config.init_method
        return self.config.init_method


def _draw_time_steps(value: Tensor) -> None:
    """What softplus makes time steps of, uniform in their logarithm."""
    steps = value.uniform_(math.log(0.001), math.log(0.1)).exp_()
    value.add_(torch.log(-torch.expm1(-steps)))
