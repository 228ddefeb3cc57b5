"""The modules that stand in for the library's own where a part of a weight is held.

Each is mixed in front of the module's own class (`partitioned_class`), so that a module keeps its parameters,
hooks, attributes and type, and what it computes stays the library's code: only what crosses ranks is added.
Hidden states are replicated on the tensor parallel ranks; `replicated` says what that means for gradients.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.replicated import joined, sum_of, to_ranks
from helix_megatron.huggingface.sharding import Sharding

# Mixins call `super()`, whose methods come from the module's own class.
_Module = nn.Module


class Partitioned(_Module):
    """What all mixins have: the model's sharding, and the vocabulary's bounds for those that need them."""

    sharding: Sharding


class RowParallelLinear(Partitioned):
    """A linear layer with some of the input columns: the parts' sum, and the bias added once."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """[.., columns/p] → [.., rows], replicated."""
        part = F.linear(x, self.weight)
        whole = sum_of(part, self.sharding.tensor_group, purpose="tensor/row-linear")
        return whole if self.bias is None else whole + self.bias


class PartitionedMLP(Partitioned):
    """A gated MLP of which this rank has a part of the intermediate dimension. `down_proj` sums."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[.., D] → [.., D], both replicated. What else the library passes goes on to its own code."""
        x = to_ranks(x, self.sharding.tensor_group, purpose="tensor/mlp")
        return super().forward(x, *args, **kwargs)


class PartitionedExperts(Partitioned):
    """Stacked experts, each with a part of its intermediate dimension; every rank routes every token alike."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states [tokens, D] and whatever the library's experts take → [tokens, D], replicated."""
        group, purpose = self.sharding.tensor_group, "tensor/experts"

        def on_ranks(x: Any) -> Any:
            # A routing weight multiplies each rank's part of the output, so its gradient is a sum, too.
            floating = isinstance(x, Tensor) and x.is_floating_point()
            return to_ranks(x, group, purpose=purpose) if floating else x

        kwargs = {name: on_ranks(value) for name, value in kwargs.items()}
        bias = self._parameters.get("down_proj_bias")
        if bias is not None:  # each rank adds a p-th of it
            self._parameters["down_proj_bias"] = on_ranks(bias) / group.size()
        try:
            part = super().forward(*map(on_ranks, args), **kwargs)
        finally:
            if bias is not None:
                self._parameters["down_proj_bias"] = bias
        return sum_of(part, group, purpose=purpose)


class PartitionedDeltaNet(Partitioned):
    """A gated delta net with some of its key heads, and the value heads of each. `out_proj` sums."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, L, D] → [B, L, D], both replicated; states in a cache are those of this rank's heads."""
        x = to_ranks(hidden_states, self.sharding.tensor_group, purpose="tensor/delta-net")
        return super().forward(x, *args, **kwargs)


class UsedByRanks(Partitioned):
    """A norm or an activation that is whole on every rank, and works on what each rank has of its own.

    Its parameters' gradients are therefore summed over the ranks.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's own."""
        current: dict[str, Any] = self._parameters
        own, group = dict(current), self.sharding.tensor_group
        for name, parameter in own.items():
            if parameter is not None:
                current[name] = to_ranks(parameter, group, purpose="tensor/whole-parameters")
        try:
            return super().forward(*args, **kwargs)
        finally:
            current.update(own)


class PartitionedEmbedding(Partitioned):
    """The rows of some tokens. `first_token` is the first of them."""

    first_token: int
    weight: Tensor

    def forward(self, token_ids: Tensor) -> Tensor:
        """int [..] → [.., D], replicated."""
        local = token_ids - self.first_token
        elsewhere = (local < 0) | (local >= self.weight.size(0))
        part = super().forward(local.masked_fill(elsewhere, 0))
        part = part.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return sum_of(part, self.sharding.tensor_group, purpose="tensor/embedding")


class PartitionedOutput(Partitioned):
    """The output layer with the rows of some tokens; every rank gets all logits."""

    vocabulary: tuple[int, ...]  # tokens of each rank

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] → [.., vocabulary], replicated."""
        group, purpose = self.sharding.tensor_group, "tensor/logits"
        part = super().forward(to_ranks(x, group, purpose=purpose))
        widest = max(self.vocabulary)
        if min(self.vocabulary) == widest:
            return joined(part, group, dim=-1, purpose=purpose)
        part = F.pad(part, (0, widest - part.size(-1)))
        whole = joined(part, group, dim=-1, purpose=purpose).unflatten(-1, (-1, widest))
        return torch.cat(
            [whole[..., rank, :size] for rank, size in enumerate(self.vocabulary)], dim=-1
        )


class PartitionedHeadNorm(Partitioned):
    """RMS norm over heads (Qwen3's `q_norm`, `k_norm`), of which this rank has segments.

    The weight is whole on every rank, [d]; its gradient is the sum over ranks.
    """

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, heads, d/m] → the same."""
        sharding = self.sharding
        weight = to_ranks(self.weight, sharding.tensor_group, purpose="tensor/head-norm")
        weight = weight[sharding.segment_index(weight.device)]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        group, head_dim = sharding.intra_head_group, sharding.plan.layout.head_dim
        mean = head_mean(wide.square(), head_dim, group)
        return weight * (wide * torch.rsqrt(mean + self.variance_epsilon)).to(x.dtype)


def resize_convolution(convolution: Any, channels: int) -> None:
    """Give a convolution of each channel by itself so many of them, in place."""
    for name in ("groups", "in_channels", "out_channels"):
        setattr(convolution, name, channels)


def replace(module: nn.Module, mixin: type[Partitioned], **attributes: Any) -> None:
    """Put a mixin in front of a module's class, in place, and set attributes."""
    classes: Any = (mixin, type(module))  # hashable, though torch's annotations deny it
    module.__class__ = partitioned_class(*classes)
    for name, value in attributes.items():
        setattr(module, name, value)


@lru_cache(maxsize=256)
def partitioned_class(mixin: Any, own: Any) -> Any:
    """The class of a module of class `own` once it is partitioned by a mixin."""
    return type(f"Partitioned{own.__name__}", (mixin, own), {"__module__": mixin.__module__})
