"""Layer norms of plain torch that megatron-core can use anywhere, sequence parallelism included.

Without apex and Transformer Engine megatron-core falls back to `WrappedTorchNorm`, which refuses sequence
parallelism and zero-centred weights. And when any package called `apex` is installed it takes its
`FusedLayerNorm`, which then fails to build if apex's CUDA extension is missing. `use_available_norms` puts
`TorchNorm` in place of both.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from helix_megatron.errors import HelixError
from helix_megatron.megatron.optional import available_backends

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig


class TorchNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, as `config.normalization` says.

    `x[..., hidden_size] -> [..., hidden_size]`. Parameters and their names (`weight`, and `bias` for
    LayerNorm) are those of megatron-core's norms, so checkpoints are interchangeable. With
    `config.layernorm_zero_centered_gamma` the stored weight w scales by 1 + w.

    With sequence parallelism every tensor-parallel rank sees a part of the tokens; the parameters carry
    the mark `sequence_parallel`, by which `finalize_model_grads` sums their gradients.

    `persist_layer_norm`, `zero_centered_gamma` and `normalization` are accepted since megatron-core's
    norms have them; as there, the configuration decides.

    Raises `HelixError` for another normalization.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        super().__init__()
        if config.normalization not in ("LayerNorm", "RMSNorm"):
            raise HelixError(
                f"normalization is {config.normalization!r}. Valid values without Transformer Engine: "
                "LayerNorm, RMSNorm."
            )
        for setting in ("persist_layer_norm", "memory_efficient_layer_norm"):
            if getattr(config, setting):
                warnings.warn(f"{setting} has no effect on torch's norms.", stacklevel=2)
        self.normalization = config.normalization
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.eps = eps
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias: torch.nn.Parameter | None = None
        if self.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            # An attribute by which megatron-core finds the parameter; torch does not know it.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + 1 if self.zero_centered else self.weight
        if self.normalization == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, {self.normalization}, eps={self.eps}"


def use_available_norms(spec: Any) -> Any:
    """A copy of a layer or block spec in which every norm can be built here; `spec` stays as it is.

    `spec` is a `ModuleSpec`, a `TransformerBlockSubmodules` or any other dataclass of submodules. All
    norms in it count, at any depth: before attention and MLP, of queries and keys, and a block's final
    one. `WrappedTorchNorm` becomes `TorchNorm`; so does apex's fused norm where apex cannot serve.

    The final norm belongs to the block: for a model with torch norms pass a block spec.
    """
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    replaced = [WrappedTorchNorm]
    if available_backends().norm != "apex":
        replaced.append(FusedLayerNorm)
    return with_classes(spec, dict.fromkeys(replaced, TorchNorm))


def with_classes(value: Any, classes: Mapping[type, type]) -> Any:
    """A copy of a spec in which other classes stand for some, at any depth; all else is shared."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: with_classes(getattr(value, field.name), classes)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, functools.partial):  # from 0.18 on, what builds an MLP
        build = with_classes(value.func, classes)
        parts = {name: with_classes(part, classes) for name, part in value.keywords.items()}
        if build is value.func and parts == value.keywords:
            return value  # since partial functions of equal parts are not equal
        return functools.partial(build, *value.args, **parts)
    if isinstance(value, list | tuple):
        return type(value)(with_classes(item, classes) for item in value)
    if isinstance(value, dict):  # a module's parameters: they hold settings, not specs
        return dict(value)
    return classes.get(value, value) if isinstance(value, type) else value
