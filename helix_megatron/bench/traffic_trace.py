"""Run a transformer layer as one rank of many, on fake tensors and a fake process group; count its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helix_megatron.bench.contest import layer_settings
from helix_megatron.bench.traffic_layer import Layer
from helix_megatron.core.meter import EXCHANGE, measure
from helix_megatron.megatron.fake_world import fake_world
from helix_megatron.megatron.norms import use_available_norms
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.transformer_config import HelixTransformerConfig


def trace(layer: Layer, exchanges: Sequence[tuple[str, int]], rank: int) -> list[tuple[int, int]]:
    """For each (exchange, micro-batch size): bytes that `rank` sends for it, and for all else.

    Raises:
        HelixError: this process belongs to a process group already.
    """
    with (
        fake_world(rank, layer.ranks, layer.ranks, intra_head_parallel_size=layer.segments),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        return [_trace(layer, exchange, batch) for exchange, batch in exchanges]


def _trace(layer: Layer, exchange: str, batch: int) -> tuple[int, int]:
    module = _build(layer, exchange)
    tokens = layer.sequence_length // (layer.ranks if layer.sequence_parallel else 1)
    x = torch.empty(tokens, batch, layer.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with measure() as meter:
        output, _ = module(x, attention_mask=None)
        output.backward(torch.empty_like(output))
    exchanged = meter.bytes(EXCHANGE)
    return exchanged, meter.bytes() - exchanged


def _build(layer: Layer, exchange: str) -> Any:
    sizes = (layer.heads, layer.kv_heads, layer.head_dim, layer.ranks)
    settings = layer_settings(
        *sizes,
        hidden_size=layer.hidden_size,
        ffn_hidden_size=layer.ffn_hidden_size,
        sequence_parallel=layer.sequence_parallel,
        params_dtype=torch.bfloat16,
        bf16=True,
        hidden_dropout=0.0,
        bias_dropout_fusion=False,
        rotary_percent=0.0,
    )
    config = HelixTransformerConfig(**settings, helix=layer.helix(exchange))
    spec = use_available_norms(get_gpt_layer_local_spec())
    spec = helix_spec(spec, config.helix, kernel=_unmasked)
    return build_module(spec, config=config, layer_number=1).train()


def _unmasked(q_BHLD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, **ignored: Any) -> Tensor:
    """Attention without its mask: torch's causal bias is no fake tensor, and no mask changes what crosses."""
    grouped = q_BHLD.size(1) != k_BGSD.size(1)
    return F.scaled_dot_product_attention(q_BHLD, k_BGSD, v_BGSE, enable_gqa=grouped)
