"""Replace self-attention in any GPT layer or block spec, local or Transformer Engine, dense or MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import get_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.kernels import AttentionKernel
from helix_megatron.kernels.sdpa import sdpa
from helix_megatron.megatron.self_attention import (
    HelixSelfAttention,
    SegmentLocalSelfAttention,
    VirtualSelfAttention,
)


def helix_spec(spec: Any, helix: HelixConfig, *, kernel: AttentionKernel = sdpa) -> Any:
    """A layer or block spec with self-attention replaced; everything else is shared with the given one.

    Args:
        spec: a layer's or block's `ModuleSpec`, or a block's `TransformerBlockSubmodules`. It is not changed.
            With m = 1 it is returned as it is: stock attention. A replaced spec stays as it is, too.
        helix: the partitioning; must be that of the transformer configuration that builds the layer.
        kernel: local attention of `exact`.

    Raises:
        HelixError: the spec's self-attention is not Megatron's `SelfAttention`, or was replaced for the other
            kind of attention.
    """
    if not helix.active:
        return spec
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [helix_spec(layer, helix, kernel=kernel) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    if isinstance(spec.submodules, TransformerBlockSubmodules):
        return dataclasses.replace(
            spec, submodules=helix_spec(spec.submodules, helix, kernel=kernel)
        )
    attention = getattr(spec.submodules, "self_attention", None)
    if attention is None or attention is IdentityOp:
        return spec  # a layer without attention
    exact = helix.attention == "exact"
    wanted: type = HelixSelfAttention if exact else SegmentLocalSelfAttention
    module = get_module(attention)
    if isinstance(module, type) and issubclass(module, wanted):
        return spec
    if isinstance(module, type) and issubclass(module, VirtualSelfAttention):
        raise HelixError(
            f"the layer's self-attention was replaced by {module.__name__} already, and attention "
            f"{helix.attention} needs {wanted.__name__}. Pass the spec as Megatron made it."
        )
    if module is not SelfAttention:
        raise HelixError(
            f"the layer's self-attention is {getattr(module, '__name__', module)}, and heads can be cut in "
            "Megatron's SelfAttention only. Use a GPT layer spec with ordinary self-attention, or leave "
            "--intra-head-parallel-size at 1."
        )
    params = {**attention.params, "kernel": kernel} if exact else attention.params
    replaced = dataclasses.replace(attention, module=wanted, params=params)
    submodules = dataclasses.replace(spec.submodules, self_attention=replaced)
    return dataclasses.replace(spec, submodules=submodules)
