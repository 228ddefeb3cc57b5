"""Gated delta nets (arXiv 2412.06464) in place of attention in some layers, as in Qwen3-Next and Qwen3.5.

They are megatron-core's own, cut by their own heads as ordinary tensor parallelism. Without a GPU they take
megatron-core's path in plain torch; with one they need flash-linear-attention.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from helix_megatron.errors import HelixError
from helix_megatron.megatron.norms import TorchNorm


class DeltaNet(GatedDeltaNet):
    """megatron-core's layer, [S, B, D] → [S, B, D]."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            config = copy.copy(config)
            config.deterministic_mode = True
        super().__init__(config, *args, **kwargs)


class PlainNorm(TorchNorm):
    """The norm of each head of what a delta net gives; its weights are stored as in Qwen's files, not less 1.

    Each tensor parallel rank has some of the heads. Megatron sums the gradients of norms only with sequence
    parallelism, so without it they are summed here.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float) -> None:
        config = copy.copy(config)
        config.layernorm_zero_centered_gamma = False
        super().__init__(config, hidden_size, eps)
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            self.weight.register_hook(sum_over_ranks)


def sum_over_ranks(gradient: Tensor) -> Tensor:
    """Of the tensor parallel ranks, on each of them; a hook for a tensor that all have, and use a part of."""
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total


def with_delta_nets(spec: Any, linear: Sequence[bool], *, use_engine: bool) -> Any:
    """A block spec with gated delta nets instead of attention in these layers; the given one is not changed.

    Args:
        spec: of a block, with Megatron's local layers or Transformer Engine's.
        linear: for each of its layers, whether it has a gated delta net.
        use_engine: whether the layers are Transformer Engine's, whose projection has the norm before it.

    Raises:
        HelixError: there is a GPU, and not the package with which megatron-core computes them there.
    """
    if torch.cuda.is_available() and importlib.util.find_spec("fla") is None:
        raise HelixError(
            "megatron-core computes gated delta nets on a GPU with flash-linear-attention, which is not "
            "installed. Try pip install flash-linear-attention."
        )
    ends: tuple[Any, Any] = (ColumnParallelLinear, RowParallelLinear)
    if use_engine:
        from megatron.core.extensions import transformer_engine as engine

        ends = (engine.TELayerNormColumnParallelLinear, engine.TERowParallelLinear)
    parts = GatedDeltaNetSubmodules(in_proj=ends[0], out_norm=PlainNorm, out_proj=ends[1])
    delta_net = ModuleSpec(module=DeltaNet, submodules=parts)

    def replaced(layer: ModuleSpec) -> ModuleSpec:
        own = layer.submodules
        norm = {"input_layernorm": IdentityOp} if use_engine else {}
        names = own.sharded_state_dict_keys_map | {
            "input_layernorm.": "self_attention.in_proj.layer_norm_"
        }
        own = dataclasses.replace(
            own, self_attention=delta_net, sharded_state_dict_keys_map=names, **norm
        )
        return dataclasses.replace(layer, submodules=own)

    pairs = zip(spec.layer_specs, linear, strict=True)
    layers = [replaced(layer) if is_linear else layer for layer, is_linear in pairs]
    return dataclasses.replace(spec, layer_specs=layers)
