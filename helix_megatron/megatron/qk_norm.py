"""Query and key norms over heads that are cut.

A norm needs the statistics of the whole head. Where this rank has a segment, sums over its dimensions are
reduced over the ranks of the head group. Every rank keeps the full-length weight, as stock does, and applies
its segment, so Megatron's own reduction of these gradients over the tensor parallel ranks (by the names
`q_layernorm` and `k_layernorm`) stays right, and checkpoints stay plain.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, listed
from helix_megatron.megatron.support import STOCK

PARAMETERS = {"LayerNorm": {"weight", "bias"}, "RMSNorm": {"weight"}, "L2Norm": set()}
KINDS = tuple(PARAMETERS)
PACKAGES = ("torch", "megatron", "transformer_engine", "helix_megatron")


class PartitionedNorm(nn.Module):
    """LayerNorm, RMSNorm or L2 norm of heads, of which this rank has segments or whole ones.

    Args:
        kind: one of `KINDS`.
        layout: how heads are cut; this rank has segment `group.rank()`.
        group: the ranks of the head group.
        whole: this rank has whole heads, presented as segments: [S, B, m·x, d/m] for x heads.
        zero_centered: the weight is stored minus 1 (`layernorm_zero_centered_gamma`).
    """

    dims: Tensor

    def __init__(
        self,
        kind: str,
        layout: HeadLayout,
        group: ProcessGroup,
        *,
        whole: bool,
        eps: float,
        zero_centered: bool = False,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise HelixError(f"query-key norm {kind!r} is unknown. Valid: {', '.join(KINDS)}.")
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.head_dim, self.whole, self.group = layout.head_dim, whole, group
        dims = torch.as_tensor(layout.segment_dims(group.rank()), device=device)
        self.register_buffer("dims", dims, persistent=False)
        if kind != "L2Norm":
            start = torch.zeros if zero_centered else torch.ones
            self.weight = nn.Parameter(start(layout.head_dim, dtype=dtype, device=device))
        if kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(layout.head_dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, heads, d/m] → the same, normalised over whole heads; statistics in at least fp32."""
        shape, dtype = x.shape, x.dtype
        if self.whole:
            x = x.reshape(*shape[:2], -1, self.head_dim)
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.kind == "LayerNorm":
            x = x - self._mean(x)
        x = x * torch.rsqrt(self._mean(x.square()) + self.eps)
        if self.kind != "L2Norm":
            weight = self._own(self.weight).to(x.dtype)
            x = x * (weight + 1 if self.zero_centered else weight)
        if self.kind == "LayerNorm":
            x = x + self._own(self.bias).to(x.dtype)
        return x.to(dtype).reshape(shape)

    def _mean(self, x: Tensor) -> Tensor:
        return head_mean(x, self.head_dim, None if self.whole else self.group)

    def _own(self, weight: Tensor) -> Tensor:
        return weight if self.whole else weight[self.dims]


def norm_kind(built: nn.Module | None, name: str) -> str | None:
    """Which of `KINDS` a query or key norm is that Megatron has built; None for no norm.

    A spec may name none and leave the choice to the configuration, and a builder may give an instance of
    another class than its own, so only the instance tells.

    Args:
        built: what the stock layer holds as `q_layernorm` or `k_layernorm`.
        name: how the layer calls it, for the error.

    Raises:
        HelixError: it is another module, whose arithmetic Helix cannot repeat on cut heads.
    """
    if built is None or isinstance(built, IdentityOp):
        return None
    package, kind = type(built).__module__.partition(".")[0], type(built).__name__
    if kind in ("TorchNorm", "FusedLayerNorm"):
        kind = getattr(built, "normalization", "LayerNorm")
    parameters = {parameter for parameter, _ in built.named_parameters()}
    if package not in PACKAGES or PARAMETERS.get(kind) != parameters:
        raise HelixError(
            f"{name} of self-attention is {type(built).__module__}.{type(built).__qualname__} with parameters "
            f"{listed(sorted(parameters))}, and Helix can normalise cut heads only as the {listed(KINDS)} of "
            f"{listed(PACKAGES)} do.",
            remedy=("Name one of those in the layer spec", *STOCK),
        )
    return kind
