"""Query and key norms over heads that are cut.

A norm needs the statistics of the whole head. Where this rank has a segment, sums over its dimensions are
reduced over the ranks of the head group. Every rank keeps the full-length weight, as stock does, and applies
its segment, so Megatron's own reduction of these gradients over the tensor parallel ranks (by the names
`q_layernorm` and `k_layernorm`) stays right, and checkpoints stay plain.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron.core.head_norm import head_mean
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, listed
from helix_megatron.megatron.flat_norm import FlatNorm
from helix_megatron.megatron.support import STOCK

PARAMETERS = {"LayerNorm": {"weight", "bias"}, "RMSNorm": {"weight"}, "L2Norm": set()}
KINDS = tuple(PARAMETERS)
PACKAGES = ("torch", "megatron", "transformer_engine", "helix_megatron")


class PartitionedNorm(nn.Module):
    """LayerNorm, RMSNorm or L2 norm of heads of which this rank has segments.

    Args:
        kind: one of `KINDS`.
        layout: how heads are cut; this rank has segment `group.rank()`.
        group: the ranks of the head group.
        parameters: full-length `weight` and `bias`, those that the kind has.
        zero_centered: the weight is stored minus 1 (`layernorm_zero_centered_gamma`).
    """

    dims: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        kind: str,
        layout: HeadLayout,
        group: ProcessGroup,
        parameters: Mapping[str, nn.Parameter],
        *,
        eps: float,
        zero_centered: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.head_dim, self.group = layout.head_dim, group
        dims = torch.as_tensor(layout.segment_dims(group.rank()), device=device)
        self.register_buffer("dims", dims, persistent=False)
        for name, parameter in parameters.items():
            setattr(self, name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, heads, d/m] → the same, normalised over whole heads; statistics in at least fp32."""
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if self.kind == "LayerNorm":
            x = x - head_mean(x, self.head_dim, self.group)
        x = x * torch.rsqrt(head_mean(x.square(), self.head_dim, self.group) + self.eps)
        if self.kind != "L2Norm":
            weight = self.weight[self.dims].to(x.dtype)
            x = x * (weight + 1 if self.zero_centered else weight)
        if self.kind == "LayerNorm":
            x = x + self.bias[self.dims].to(x.dtype)
        return x.to(dtype)


def cut_norm(
    built: nn.Module | None, name: str, attention: Any
) -> PartitionedNorm | FlatNorm | None:
    """The norm of cut heads that does what `built` does on whole ones; it shares parameters of full length.

    Args:
        built: what the stock layer holds as `q_layernorm` or `k_layernorm`; `name` is how it calls it.
        attention: the layer, whose layout, group and configuration count.
    """
    if isinstance(built, FlatNorm):
        layout, rank = attention.layout, attention.pg_collection.tp.rank()
        queries = name == "q_layernorm"
        return built.on(layout.query_rows(rank) if queries else layout.kv_rows(rank))
    kind, config = norm_kind(built, name), attention.config
    if kind is None or built is None:
        return None
    parameters = dict(built.named_parameters())
    for part, parameter in parameters.items():
        if parameter.numel() != attention.layout.head_dim:
            start = float(part == "weight" and not config.layernorm_zero_centered_gamma)
            full = parameter.new_full((attention.layout.head_dim,), start)
            parameters[part] = nn.Parameter(full)
    return PartitionedNorm(
        kind,
        attention.layout,
        attention.intra_head_group,
        parameters,
        eps=getattr(built, "eps", config.layernorm_epsilon),
        zero_centered=config.layernorm_zero_centered_gamma,
        device=None if config.use_cpu_initialization else torch.cuda.current_device(),
    )


def normalise_behind_rotary(model: Any) -> None:
    """Apply norms of queries and keys behind rotary embedding, as Hunyuan does; Megatron applies them before.

    The layers keep the norms, and with them names of parameters and reductions of their gradients. What calls
    them gets its input back, and the core attention is given normalised queries and keys. Sums over a head are
    reduced as before, since the embedding turns pairs that lie in one segment.

    Args:
        model: a GPTModel whose attention has `q_layernorm` and `k_layernorm`.
    """
    for layer in model.decoder.layers:
        attention = layer.self_attention
        norms = []
        for norm in (attention.q_layernorm, attention.k_layernorm):
            norms.append(norm.forward)
            norm.forward = _unchanged
        attention.core_attention.register_forward_pre_hook(functools.partial(_normalise, norms))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _normalise(norms: list[Callable[[Tensor], Tensor]], core: Any, args: Any) -> tuple[Any, ...]:
    query, key, *others = args
    return norms[0](query), norms[1](key), *others


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
