"""A core attention with the signature of Transformer Engine's, in plain torch: what a host's kernel would see.

It refuses what the real one refuses (numbers of heads, layouts of memory) and does what ours do not: sinks, a
bias, packed sequences, the largest score of every head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class FakeTEDotProductAttention(torch.nn.Module):
    """[S, B, heads/p, d], or [T, heads/p, d] with `cu_seqlens`; a mask counts where its type says so."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = "p2p",
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.attn_mask_type = config, attn_mask_type
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        ranks = self._tp_group.size()
        assert config.num_attention_heads % ranks == 0
        assert config.num_query_groups % ranks == 0
        self.heads = config.num_attention_heads // ranks
        self.num_gqa_groups = config.num_query_groups // ranks
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window_size = config.window_size if windowed else (-1, -1)
        self.softmax_offset: Any = None
        if config.softmax_type == "off-by-one":
            self.softmax_offset = torch.zeros(self.heads, dtype=config.params_dtype)
        elif config.softmax_type == "learnable":
            sinks = torch.zeros(self.heads, dtype=config.params_dtype)
            self.softmax_offset = torch.nn.Parameter(sinks)
        self.current_max_attn_logits: Tensor | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> Tensor:
        for tensor, heads in ((query, self.heads), (key, self.num_gqa_groups)):
            assert tensor.shape[-2:] == (heads, self.config.kv_channels), tensor.shape
        assert key.is_contiguous() and value.is_contiguous()
        packed = packed_seq_params is not None
        assert query.dim() == (3 if packed else 4)
        if packed:
            assert packed_seq_params.qkv_format == "thd"
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        hidden = self._hidden(query.size(0), key.size(0), attention_mask, attn_mask_type)
        if packed:
            hidden = hidden | _other_sequences(packed_seq_params, query.size(0))
        share = query.size(2) // key.size(2)
        key, value = (tensor.repeat_interleave(share, dim=2) for tensor in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.scale
        if attention_bias is not None:
            scores = scores + attention_bias
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.config.qk_clip or self.config.log_max_attention_logit:
            largest = scores.detach().amax((0, 2, 3))
            before = self.current_max_attn_logits
            self.current_max_attn_logits = largest if before is None else before.max(largest)
        if self.softmax_offset is not None:
            sinks = self.softmax_offset.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : key.size(0)]
        output = torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)
        return output.squeeze(1) if packed else output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self._tp_group,
            dp_cp_group=metadata["dp_cp_group"] if metadata else None,
        )

    def _hidden(
        self, queries: int, keys: int, mask: Tensor | None, mask_type: AttnMaskType
    ) -> Tensor:
        position = torch.arange(keys - queries, keys).unsqueeze(1)
        key, (left, right) = torch.arange(keys), self.window_size
        hidden = torch.zeros(queries, keys, dtype=torch.bool)
        if mask_type in CAUSAL:
            hidden |= key > position
        if left >= 0:
            hidden |= key < position - left
        if right >= 0:
            hidden |= key > position + right
        if (
            mask is not None and "padding" in mask_type.name
        ) or mask_type is AttnMaskType.arbitrary:
            hidden = hidden | mask
        return hidden


def _other_sequences(packed: Any, tokens: int) -> Tensor:
    """bool [T, T]: True between tokens of different sequences, and for what lies behind the last one."""
    padded = packed.cu_seqlens_q_padded
    ends = (packed.cu_seqlens_q if padded is None else padded)[1:]
    sequence = torch.searchsorted(ends, torch.arange(tokens), right=True)
    return sequence.unsqueeze(1) != sequence
