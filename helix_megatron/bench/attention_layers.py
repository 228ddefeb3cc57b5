"""The layers that `bench attention` compares, with the same canonical weights. Runs in a rank.

Stock comes twice: as it is, and with Helix's attention kernel in the place of its own, so that only what
crosses between ranks differs. The fourth is Helix with an exchange that costs nothing and gives a wrong result:
how far any exchange could get.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from helix_megatron.bench.attention_case import FREE, HELIX, STOCK, STOCK_SDPA, Case
from helix_megatron.core.exchanges.segments import heads_first, sequence_first
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.masks import AttentionMask
from helix_megatron.megatron.self_attention import WholeHeadsSelfAttention
from helix_megatron.megatron.specs import helix_spec
from helix_megatron.megatron.transformer_config import HelixTransformerConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_layers(case: Case, rank: int) -> dict[str, Any]:
    """The four self-attention layers by name, with this rank's part of the weights."""
    layers = {name: _build(name, case) for name in (STOCK, STOCK_SDPA, HELIX, FREE)}
    qkv, proj = weights(case)
    for name, layer in layers.items():
        rows, columns = canonical_part(case, rank, stock=name in (STOCK, STOCK_SDPA))
        with torch.no_grad():
            layer.linear_qkv.weight.copy_(qkv[rows])
            layer.linear_proj.weight.copy_(proj[:, columns])
        layer.to(torch.cuda.current_device())
    return layers


def weights(case: Case) -> tuple[Tensor, Tensor]:
    """Whole canonical `linear_qkv` and `linear_proj`, the same on every rank."""
    random = torch.Generator().manual_seed(1)
    hidden = case.hidden_size
    qkv = torch.randn(case.qkv_rows, hidden, generator=random)
    proj = torch.randn(hidden, case.heads * case.head_dim, generator=random)
    return qkv * hidden**-0.5, proj * hidden**-0.5


def canonical_part(case: Case, rank: int, *, stock: bool) -> tuple[Tensor, Tensor]:
    """Canonical rows of `linear_qkv` and columns of `linear_proj` that a rank holds, in its order."""
    if stock:  # contiguous parts
        sizes = (case.qkv_rows, case.heads * case.head_dim)
        rows, columns = (torch.arange(size).chunk(case.ranks)[rank] for size in sizes)
        return rows, columns
    layout = case.layout
    return torch.as_tensor(layout.qkv_rows(rank)), torch.as_tensor(layout.proj_columns(rank))


def rotary_table(case: Case) -> Tensor:
    """Rotary angles [S, 1, 1, d], as Megatron's `RotaryEmbedding` gives them."""
    frequencies = 1e4 ** (-torch.arange(0, case.head_dim, 2) / case.head_dim)
    angles = torch.outer(torch.arange(case.sequence_length).float(), frequencies)
    return torch.cat([angles, angles], dim=-1)[:, None, None].to(torch.cuda.current_device())


def _build(name: str, case: Case) -> Any:
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": case.hidden_size,
        "num_attention_heads": case.heads,
        "num_query_groups": case.kv_heads,
        "kv_channels": case.head_dim,
        "tensor_model_parallel_size": case.ranks,
        "params_dtype": DTYPES[case.dtype],
        "bf16": case.dtype == "bf16",
        "use_cpu_initialization": True,
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "add_bias_linear": False,
    }
    spec = get_gpt_layer_local_spec()
    if name in (HELIX, FREE):
        config = HelixTransformerConfig(**settings, helix=case.helix)
        attention = helix_spec(spec, case.helix).submodules.self_attention
    else:
        config = TransformerConfig(**settings)
        attention = spec.submodules.self_attention
    if name == STOCK_SDPA:
        submodules = dataclasses.replace(attention.submodules, core_attention=SdpaCore)
        attention = dataclasses.replace(attention, submodules=submodules)
    layer = build_module(attention, config=config, layer_number=1).train()
    if name == FREE and case.layout.query_layout == "heads":
        layer.__class__ = FreeGather
    elif name == FREE:
        layer.core_attention = FreeExchangeCore(layer.config, case)
    return layer


class SdpaCore(MegatronModule):
    """Stock's core attention, computed by Helix's kernel."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """[S, B, heads, d] each → [S, B, heads·d]."""
        o_BHSD = sdpa(
            heads_first(query),
            heads_first(key),
            heads_first(value),
            mask=AttentionMask(causal=True),
            scale=query.size(-1) ** -0.5,
            dropout=0.0,
        )
        return sequence_first(o_BHSD).flatten(2)


class FreeExchangeCore(SdpaCore):
    """Helix's core attention in which each rank repeats its own segments instead of receiving others."""

    def __init__(self, config: Any, case: Case) -> None:
        super().__init__(config)
        self.head_dim, self.segments = case.head_dim, case.layout.segments

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [S, B, heads, dimensions], key and value [S, B, g/n, d/m] → [S, B, h·d/p]."""
        q_SBHD = query.reshape(*query.shape[:2], -1, self.head_dim)
        k_SBGD, v_SBGD = (t.repeat(1, 1, 1, self.segments) for t in (key, value))
        return super().forward(q_SBHD, k_SBGD, v_SBGD)


class FreeGather(WholeHeadsSelfAttention):
    """Helix's gather behind the projection, with a rank's own segments in the place of the others'."""

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        query, kv_SBG2C = self._project(hidden_states)
        kv_SBG2D = kv_SBG2C[:, :, : self.num_query_groups_per_partition]
        key, value = kv_SBG2D.repeat(1, 1, 1, 1, self.layout.segments).unbind(3)
        return query, key.contiguous(), value.contiguous()
