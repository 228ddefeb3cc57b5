"""One norm over all query heads together and one over all key heads, as OLMo 2 and MiniMax-M2 have them.

megatron-core normalises each head by itself. A rank has some of the heads, or segments of them, and the mean is
taken over all ranks. Every rank keeps the whole weight and applies its part, so that Megatron's own sum of
these gradients over tensor parallel ranks (by the names `q_layernorm` and `k_layernorm`) is right.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.core.exchanges.gather_kv import attended_heads
from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.layout import HeadLayout


class FlatNorm(nn.Module):
    """RMS norm over all heads of queries, or of keys.

    Args:
        config: of the layer.
        hidden_size: accepted since Megatron gives it to norms of heads.
        eps: added to the mean square.
        heads, head_dim: of the whole model.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float, *, heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.eps, self.head_dim = eps, head_dim
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(heads * head_dim, dtype=config.params_dtype))
        self.group: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self._columns: Tensor | None = None

    def on(self, columns: np.ndarray) -> FlatNorm:
        """The same norm, sharing its weight, of these dimensions of all heads, in this order."""
        norm = FlatNorm.__new__(FlatNorm)
        nn.Module.__init__(norm)
        norm.eps, norm.head_dim, norm.zero_centered = self.eps, self.head_dim, self.zero_centered
        norm.weight, norm.group = self.weight, self.group
        norm._columns = torch.as_tensor(columns, device=self.weight.device)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, heads, dimensions] of this rank → the same; statistics in at least fp32.

        Where several ranks have a head, all heads have equally many copies, so that the mean over what all
        ranks have is the mean over all heads.
        """
        flat = x.flatten(-2)
        wide = flat.to(torch.promote_types(x.dtype, torch.float32))
        mean = head_mean(wide.square(), wide.size(-1) * self.group.size(), self.group)
        own = self._own_columns(flat.size(-1))
        weight = self.weight[own] + 1 if self.zero_centered else self.weight[own]
        return (wide * torch.rsqrt(mean + self.eps) * weight.to(wide.dtype)).to(x.dtype).view_as(x)

    def _own_columns(self, size: int) -> Any:
        """Those of whole heads in order, as stock tensor parallelism deals them, unless others were named."""
        if self._columns is None:
            first = self.group.rank() * size
            return slice(first, first + size)
        if self._columns.device != self.weight.device:
            self._columns = self._columns.to(self.weight.device)
        return self._columns


def whole_key_columns(layout: HeadLayout, rank: int) -> np.ndarray:
    """Dimensions of all key heads, int64 [u·d], of the whole key heads with which a rank attends."""
    group, member = layout.partition(rank)
    heads = group * layout.group_kv_heads + np.asarray(attended_heads(layout, member))
    return (heads[:, None] * layout.head_dim + np.arange(layout.head_dim)).reshape(-1)


def with_flat_norms(spec: Any, *, heads: int, kv_heads: int, head_dim: int) -> Any:
    """A block spec whose self-attention normalises all heads together; it is not changed."""

    def norm(count: int) -> ModuleSpec:
        return ModuleSpec(module=FlatNorm, params={"heads": count, "head_dim": head_dim})

    layers = []
    for layer in spec.layer_specs:
        attention = layer.submodules.self_attention
        parts = dataclasses.replace(
            attention.submodules, q_layernorm=norm(heads), k_layernorm=norm(kv_heads)
        )
        attention = dataclasses.replace(attention, submodules=parts)
        submodules = dataclasses.replace(layer.submodules, self_attention=attention)
        layers.append(dataclasses.replace(layer, submodules=submodules))
    return dataclasses.replace(spec, layer_specs=layers)
