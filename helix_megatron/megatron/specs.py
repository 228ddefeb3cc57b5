"""Replace self-attention in any layer, block or hybrid stack spec, local or Transformer Engine, or MoE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, get_module

from helix_megatron.config import HelixConfig
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.errors import HelixError, Text, listed
from helix_megatron.megatron.self_attention import (
    HelixSelfAttention,
    SegmentLocalSelfAttention,
    VirtualSelfAttention,
)
from helix_megatron.megatron.support import STOCK

LATENT_LAYERS = {
    "mla_layer": "a latent attention layer (+), which keeps one latent vector for all heads and no key-value "
    "heads that could be cut",
    "dsa_layer": "a sparse attention layer (D), which keeps one latent vector for all heads and picks its keys "
    "by an indexer",
}
"""Layers of a hybrid stack whose attention is latent or sparse; a stack's spec has them whether used or not."""

NESTED = ("layer_specs", "transformer_layer", "mtp_model_layer", "mtp_block_spec")
"""Where blocks, and blocks and layers of multi-token prediction, hold the layers that they are made of."""

WITHOUT_ATTENTION = (
    None,
    "IdentityOp",
    "ColumnParallelLinearGathered",
    "TELayerNormColumnParallelLinearGathered",
)
"""What stands in the place of attention in a layer that has none; the linear ones in heterogeneous models."""


class RefusedLayer:
    """Stands for a layer of a hybrid stack that cannot be built, where its pattern asks for it."""

    def __init__(self, *args: Any, reason: str, remedy: Text, **kwargs: Any) -> None:
        raise HelixError(f"the model's layer pattern asks for {reason}.", remedy=remedy)


INSTEAD = ("Use the attention layer (*) instead", *STOCK)


def helix_spec(spec: Any, helix: HelixConfig, *, kernel: AttentionKernel | None = None) -> Any:
    """A layer, block or stack spec with self-attention replaced; everything else is shared with the given one.

    In a stack of `HybridModel` (`MambaModel` before megatron-core 0.18) the attention layer (`*`) is replaced.

    Args:
        spec: a layer's, block's or stack's `ModuleSpec`, or the submodules of a block or stack. It is not
            changed. With m = 1 it is returned as it is: stock attention. A replaced spec stays as it is, too.
        helix: the partitioning; must be that of the transformer configuration that builds the layer.
        kernel: computes `exact` attention on whole heads in the place of what the configuration chooses.

    Raises:
        HelixError: the spec's self-attention is not Megatron's `SelfAttention`, or was replaced for the other
            kind of attention; or attention remains that could not be replaced.
    """
    if not helix.active:
        return spec
    replaced = _replaced(spec, helix, kernel)
    if left := sorted(set(_stock_attention(replaced))):
        raise HelixError(
            f"the spec holds {listed(left)} where Helix does not replace attention: it would stay as it is. "
            "Replaced is the self_attention of a layer, of a block's layers, and of a stack's attention_layer.",
            remedy=("Use such a spec", *STOCK),
        )
    return replaced


def _replaced(spec: Any, helix: HelixConfig, kernel: AttentionKernel | None) -> Any:
    for name in NESTED:
        if (inside := getattr(spec, name, None)) is not None:
            several = isinstance(inside, list)
            layers = [_replaced(each, helix, kernel) for each in (inside if several else [inside])]
            spec = dataclasses.replace(spec, **{name: layers if several else layers[0]})
    if hasattr(spec, "attention_layer"):
        refused = {
            name: ModuleSpec(module=RefusedLayer, params={"reason": why, "remedy": INSTEAD})
            for name, why in LATENT_LAYERS.items()
            if getattr(spec, name, IdentityOp) is not IdentityOp
        }
        layer = _replaced(spec.attention_layer, helix, kernel)
        return dataclasses.replace(spec, attention_layer=layer, **refused)
    submodules: Any = getattr(spec, "submodules", None)
    if any(hasattr(submodules, name) for name in (*NESTED, "attention_layer")):
        return dataclasses.replace(spec, submodules=_replaced(submodules, helix, kernel))
    attention: Any = getattr(submodules, "self_attention", None)
    module = attention and get_module(attention)
    if getattr(module, "__name__", None) in WITHOUT_ATTENTION:
        return spec
    exact = helix.attention == "exact"
    wanted: type = HelixSelfAttention if exact else SegmentLocalSelfAttention
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
            "Megatron's SelfAttention only.",
            remedy=("Use a GPT layer spec with ordinary self-attention", *STOCK),
        )
    params = {**attention.params, "kernel": kernel} if exact and kernel else attention.params
    replaced = dataclasses.replace(attention, module=wanted, params=params)
    submodules = dataclasses.replace(submodules, self_attention=replaced)
    return dataclasses.replace(spec, submodules=submodules)


def _stock_attention(value: Any) -> Iterator[str]:
    """Names of Megatron's attention classes anywhere in a spec."""
    if isinstance(value, ModuleSpec):
        yield from _stock_attention(get_module(value))
        yield from _stock_attention(value.submodules)
    elif isinstance(value, type):
        if issubclass(value, Attention) and not issubclass(value, VirtualSelfAttention):
            yield value.__name__
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _stock_attention(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _stock_attention(item)
    elif isinstance(value, functools.partial):
        yield from _stock_attention(value.func)
