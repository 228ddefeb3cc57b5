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

from helix_megatron.core.caches.attention import Scores, StepAttention
from helix_megatron.core.caches.paged import Window
from helix_megatron.core.collectives import gather
from helix_megatron.megatron.self_attention import HelixSelfAttention, VirtualSelfAttention


class PagedSelfAttention(nn.Module):
    """In the place of a `SelfAttention`, whose projections, norms and gate it uses.

    Tokens of all sequences of a step lie one after the other: hidden states are [T, 1, hidden].

    Made on all ranks together.

    Args:
        inner: the layer of the model, stock's or one of this package's.
        index: of the layer, from 0.
        attention: of this rank.
    """

    def __init__(self, inner: Any, index: int, attention: StepAttention) -> None:
        super().__init__()
        self.inner, self.index, self.attention = inner, index, attention
        config = inner.config
        scale = config.softmax_scale or inner.hidden_size_per_attention_head**-0.5
        window = layer_window(config, inner.layer_number)
        attention.windows.add(window)
        softcap = getattr(config, "attn_logit_softcapping", None)
        self.scores = Scores(scale, window, softcap, _sinks(inner, attention))
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
            self.scores,
        )
        core = F.pad(output.flatten(1), (0, 0, 0, len(query) - tokens)).unsqueeze(1)
        if gate:
            core = inner._apply_output_gate(core, *gate)
        return inner.linear_proj(core)


def layer_window(config: Any, number: int) -> Window:
    """The window of a layer, counted from 1."""
    windowed = is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, max(1, number)
    )
    return tuple(config.window_size) if windowed else None


def layer_windows(config: Any) -> list[Window]:
    """Of all layers of a model."""
    return [layer_window(config, number) for number in range(1, config.num_layers + 1)]


def _sinks(inner: Any, attention: StepAttention) -> Tensor | None:
    """The sinks of the head group's query heads [h/n], where the layer's softmax has any. Collective."""
    offset = getattr(inner.core_attention, "softmax_offset", None)
    if offset is None:
        return None
    own = offset.detach().flatten()
    if own.numel() == attention.layout.group_heads:
        return own
    return gather(own, attention.group, purpose="load").flatten()
