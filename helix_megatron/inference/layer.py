"""Megatron's self-attention layer with its core attention replaced by that of a step."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
    _yarn_get_concentration_factor_from_config,
)
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from helix_megatron.core.caches.attention import StepAttention
from helix_megatron.megatron.self_attention import HelixSelfAttention, VirtualSelfAttention


class PagedSelfAttention(nn.Module):
    """In the place of a `SelfAttention`, whose projections, norms and gate it uses.

    Tokens of all sequences of a step lie one after the other: hidden states are [T, 1, hidden].

    Args:
        inner: the layer of the model, stock's or one of this package's.
        index: of the layer, from 0.
        attention: of this rank.
    """

    def __init__(self, inner: Any, index: int, attention: StepAttention) -> None:
        super().__init__()
        self.inner, self.index, self.attention = inner, index, attention
        config = inner.config
        self.scale = config.softmax_scale or inner.hidden_size_per_attention_head**-0.5
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(1, inner.layer_number)
        )
        self.window = tuple(config.window_size) if windowed else None
        attention.windows.add(self.window)
        without_rope = config.no_rope_freq
        self.rotates = not (without_rope and without_rope[inner.layer_number - 1])

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        **ignored: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `SelfAttention`. rotary_pos_emb: [T, 1, 1, rotary_dim], a row for each token."""
        inner, config = self.inner, self.inner.config
        if isinstance(inner, HelixSelfAttention):
            query, key, value, *gate = inner.cut_query_key_value(hidden_states)
        else:
            query, key, value, *gate = inner.get_query_key_value_tensors(
                hidden_states, None, output_gate=config.attention_output_gate
            )
        if rotary_pos_emb is not None and self.rotates:
            tables: Any = (rotary_pos_emb, rotary_pos_emb)
            if isinstance(inner, VirtualSelfAttention):
                tables = inner.own_rotary_tables(rotary_pos_emb)
            query, key = (
                apply_rotary_pos_emb(
                    tensor,
                    table,
                    config=config,
                    mscale=_yarn_get_concentration_factor_from_config(config),
                    cp_group=inner.pg_collection.cp,
                )
                for tensor, table in zip((query, key), tables, strict=True)
            )
        tokens = self.attention.tokens  # what comes behind them fills up sequence parallel parts
        output = self.attention.attend(
            self.index,
            query[:tokens].squeeze(1),
            key[:tokens].squeeze(1),
            value[:tokens].squeeze(1),
            scale=self.scale,
            window=self.window,
        )
        core = F.pad(output.flatten(1), (0, 0, 0, len(query) - tokens)).unsqueeze(1)
        if gate:
            core = inner._apply_output_gate(core, *gate)
        return inner.linear_proj(core)
