"""Mamba 2 layers (arXiv 2405.21060) of which each rank has some heads, computed by the library's own code.

Heads are dealt to the ranks evenly, and their groups with them. With more ranks than groups, `sharing`
neighbours have heads of one group: each holds an equal part of the group's rows of B and C, which are gathered
right behind the input projection, and the gated norm takes the mean over all of them. So every weight is held
once, and its gradient is whole where it is held; but the few of the convolution are then on every rank.

Letters: H heads of P dimensions, G groups with N states each, p ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helix_megatron.core.collectives import all_gather
from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.layout import contiguous_runs
from helix_megatron.core.replicated import to_ranks
from helix_megatron.huggingface import layers
from helix_megatron.huggingface.cuts import parts_cut
from helix_megatron.huggingface.sharding import Sharding

PURPOSE = "tensor/mamba"
ALIGNED = 8  # elements: causal_conv1d asks that of the rows of what it reads


class PartitionedMamba(layers.Partitioned):
    """A Mamba 2 layer with some of its heads. `out_proj` sums."""

    sharing: int  # ranks that have heads of one group
    channels: list[tuple[int, int]]  # of the convolution, this rank's: (first, number)
    conv1d: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, L, D] → [B, L, D], both replicated; states in a cache are those of this rank's heads."""
        group, convolution = self.sharding.tensor_group, self.conv1d._parameters
        x = to_ranks(hidden_states, group, purpose=PURPOSE)
        whole, training = dict(convolution), self.training
        for name, parameter in whole.items() if self.sharing > 1 else ():
            if parameter is not None:
                shared = to_ranks(parameter, group, purpose=PURPOSE)
                convolution[name] = torch.cat([shared.narrow(0, *run) for run in self.channels])
        # In training a kernel computes norm and output projection as well, without the other ranks.
        self.training = False
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            self.training = training
            convolution.update(whole)


class InputProjection(layers.Partitioned):
    """The input projection with the rows of some heads, and a part of those of B and C of a shared group.

    The output has all rows of the group, as a view of rows that are aligned in memory.
    """

    parts: tuple[int, int, int]  # rows of gate and x, of the parts of B and C, of the steps
    sharing: int
    padding: int
    multipliers: Tensor | None  # a buffer

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] → [.., 2·H/p·P + 2·G/p·N + H/p], G/p being 1 where the group is shared."""
        own, states, steps = super().forward(x).split(self.parts, dim=-1)
        if self.sharing > 1:
            group = self.sharding.neighbours(self.sharing)
            both = all_gather(states.unflatten(-1, (2, -1)), group, dim=-1, purpose=PURPOSE)
            states = both.flatten(-2)
        rows = torch.cat([own, states, F.pad(steps, (0, self.padding))], dim=-1)
        if self.multipliers is not None:
            rows = rows * self.multipliers
        return rows[..., : rows.size(-1) - self.padding]


class Multiplied:
    """It stands where the library multiplies by what is applied already: x times it is x itself, uncopied."""

    def __rmul__(self, x: Tensor) -> Tensor:
        return x


class SharedGatedNorm(layers.Partitioned):
    """The gated RMS norm over a group of which this rank has some heads."""

    sharing: int
    weight: Tensor
    variance_epsilon: float
    norm_before_gate = False  # unless the library's module says otherwise

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[.., H/p·P] → the same."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        gates = 1.0 if gate is None else F.silu(gate.to(wide.dtype))
        if not self.norm_before_gate:
            wide = wide * gates
        group = self.sharding.neighbours(self.sharing)
        mean = head_mean(wide.square(), self.sharing * x.size(-1), group, purpose=PURPOSE)
        normed = self.weight * (wide * torch.rsqrt(mean + self.variance_epsilon))
        return (normed * gates if self.norm_before_gate else normed).to(x.dtype)


def replace_mamba(module: Any, sharding: Sharding) -> None:
    """Give a Mamba 2 layer this rank's heads, before its parameters are cut."""
    ranks, rank, groups = sharding.plan.num_ranks, sharding.rank, module.n_groups
    sharing, heads = max(1, ranks // groups), module.num_heads // ranks
    inner, states = module.intermediate_size, groups * module.ssm_state_size
    own, dims = parts_cut(0, (inner, inner), ranks).indices[rank], inner // ranks
    # Of B and C all rows of this rank's groups, which are those of its neighbours, too.
    both = parts_cut(0, (states, states), ranks // sharing).indices[rank // sharing]
    channels = np.concatenate([own[dims:], 2 * inner + both]) - inner
    padding = -(dims + channels.size + heads) % ALIGNED
    module.in_proj.register_buffer("multipliers", None, persistent=False)
    if hasattr(module, "mup_vector"):  # Falcon-H1's multipliers of the input projection's rows
        steps = 2 * (inner + states) + np.arange(rank * heads, (rank + 1) * heads)
        rows = np.concatenate([own[:dims], inner + channels, steps])
        multipliers = module.mup_vector[..., torch.as_tensor(rows)]
        if padding:  # their product would have rows without padding
            module.in_proj.multipliers = F.pad(multipliers, (0, padding))
            del module.mup_vector
            multipliers = Multiplied()
        module.mup_vector = multipliers
    layers.replace(
        module,
        PartitionedMamba,
        sharding=sharding,
        sharing=sharing,
        channels=contiguous_runs(channels),
        n_groups=groups * sharing // ranks,
        num_heads=heads,
        intermediate_size=dims,
        conv_dim=channels.size,
    )
    layers.replace(module.out_proj, layers.RowParallelLinear, sharding=sharding)
    shared = {"sharding": sharding, "sharing": sharing}
    if sharing > 1 or padding:
        sizes = {"parts": (own.size, 2 * states // ranks, heads), "padding": padding}
        layers.replace(module.in_proj, InputProjection, **sizes, **shared)
    if sharing == 1:
        layers.resize_convolution(module.conv1d, module.conv_dim)
        if hasattr(module.norm, "n_groups"):
            module.norm.n_groups = module.n_groups
        return
    sharding.neighbours(sharing)  # made while all ranks are here
    if hasattr(module.norm, "weight"):
        layers.replace(module.norm, SharedGatedNorm, **shared)
