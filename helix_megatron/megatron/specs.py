"""Replace self-attention in any GPT layer or block spec, local or Transformer Engine, dense or MoE."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_module
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
        spec: a layer's `ModuleSpec`, or a block's `TransformerBlockSubmodules`. It is not changed. With
            m = 1 it is returned as it is: stock attention. A replaced spec stays as it is, too.
        helix: the partitioning; must be that of the transformer configuration that builds the layer.
        kernel: local attention of `exact`.

    Raises:
        HelixError: the spec's self-attention is not Megatron's `SelfAttention`.
    """
    if not helix.active:
        return spec
    if isinstance(spec, TransformerBlockSubmodules):
        layers = [helix_spec(layer, helix, kernel=kernel) for layer in spec.layer_specs]
        return dataclasses.replace(spec, layer_specs=layers)
    attention = getattr(spec.submodules, "self_attention", None)
    if attention is None or attention is IdentityOp:
        return spec  # a layer without attention
    module = get_module(attention)
    if isinstance(module, type) and issubclass(module, VirtualSelfAttention):
        return spec
    if module is not SelfAttention:
        raise HelixError(
            f"the layer's self-attention is {getattr(module, '__name__', module)}, and heads can be cut in "
            "Megatron's SelfAttention only. Use a GPT layer spec with ordinary self-attention, or leave "
            "--intra-head-parallel-size at 1."
        )
    replaced: ModuleSpec
    if helix.attention == "exact":
        replaced = dataclasses.replace(
            attention, module=HelixSelfAttention, params={**attention.params, "kernel": kernel}
        )
    else:
        replaced = dataclasses.replace(attention, module=SegmentLocalSelfAttention)
    submodules = dataclasses.replace(spec.submodules, self_attention=replaced)
    return dataclasses.replace(spec, submodules=submodules)
