"""Norms behind attention and MLP, as Gemma 3, GLM-4 and EXAONE 4 have them.

megatron-core has none. Here the projection that ends attention, or the MLP, normalises its own output before it
is added to the hidden states. The weight is called `linear_proj.post_layernorm.weight` or
`linear_fc2.post_layernorm.weight`, and every tensor parallel rank has all of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from helix_megatron.megatron.norms import TorchNorm, with_classes
from helix_megatron.megatron.optional import available_backends


class _Normalised:
    """Mixed into a row-parallel linear layer."""

    def __init__(self, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)  # type: ignore[call-arg]
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_layernorm = TorchNorm(config, size, eps)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """As the layer, after its reduction over ranks; a bias is added before the norm."""
        output, bias = super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.post_layernorm(output if bias is None else output + bias), None


class NormalisedRowParallelLinear(_Normalised, RowParallelLinear):
    """`RowParallelLinear` with a norm behind it."""


def with_post_norms(spec: Any, *, before: bool) -> Any:
    """A block spec of dense layers whose attention and MLP have norms behind them.

    Args:
        spec: of a block, with Megatron's local layers or Transformer Engine's; it is not changed.
        before: whether the norms before attention and MLP stay.
    """
    classes: dict[type, type] = {RowParallelLinear: NormalisedRowParallelLinear}
    if available_backends().transformer_engine:
        from megatron.core.extensions import transformer_engine as engine

        ends = engine.TERowParallelLinear
        classes[ends] = type("NormalisedTERowParallelLinear", (_Normalised, ends), {})
        if not before:
            classes[engine.TELayerNormColumnParallelLinear] = engine.TEColumnParallelLinear
    spec = with_classes(spec, classes)
    if before:
        return spec
    layers = [
        dataclasses.replace(
            layer,
            submodules=dataclasses.replace(
                layer.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp
            ),
        )
        for layer in spec.layer_specs
    ]
    return dataclasses.replace(spec, layer_specs=layers)
