"""One rank's share of a step of megatron-core's GPT: embedding, layers and logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as megatron_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from helix_megatron import parallel_state
from helix_megatron.core.caches import SEGMENTS, cache_layout
from helix_megatron.core.caches.attention import LocalAttention
from helix_megatron.core.caches.paged import PagedCache
from helix_megatron.core.device import on_device
from helix_megatron.core.kernels.softcap import soft_cap
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.observe import purpose
from helix_megatron.errors import HelixError
from helix_megatron.inference.layer import PagedSelfAttention, layer_windows
from helix_megatron.inference.runner import (
    Pools,
    Runner,
    is_local,
    kept_heads,
    make_tables,
    rank_layout,
)


class MegatronRunner(Runner):
    """A `GPTModel` of megatron-core.

    Args:
        model: in eval mode, all its layers on this rank's tensor parallel group. Its self-attention layers are
            replaced.
        layout: how the model's heads are cut.
        cache: the name of a cache layout.
        pages: how many pages this rank's pools have.
        page_size: how many positions a page has.
        max_context: how many positions the longest sequence has.
        vocab_size: how many tokens there are; rows of the vocabulary beyond them are padding.
        attention: `exact` or `segment-local`.

    Raises:
        HelixError: the layout of the cache does not fit the attention.
    """

    def __init__(
        self,
        model: Any,
        layout: HeadLayout,
        *,
        cache: str,
        pages: int | Pools,
        page_size: int,
        max_context: int,
        vocab_size: int,
        attention: str = "exact",
    ) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.group = megatron_state.get_tensor_model_parallel_group()
        self.layout = layout = rank_layout(layout, self.group.size())
        head_group: Any = parallel_state.get_intra_head_parallel_group()
        local = is_local(layout, attention)
        if attention == "segment-local" and layout.segments > 1 and cache != SEGMENTS:
            raise HelixError(
                f"cache layout {cache} keeps whole heads, and segment-local attention has none. Try "
                "--cache-layout segment."
            )
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        pools = pages if isinstance(pages, Pools) else Pools(pages)
        members = 1 if local else layout.segments
        self.tables = make_tables(cache, members, pools.kinds, page_size)
        kept = kept_heads(layout, cache, local, pools, layer_windows(model.config))
        self.cache = PagedCache(kept, page_size, self.dtype, self.device)
        attention_of = LocalAttention if local else cache_layout(cache).attention
        self.attentions = [
            attention_of(layout, head_group, tables, self.cache) for tables in self.tables
        ]
        for index, layer in enumerate(model.decoder.layers):
            own = self.attentions[kept[index].kind]
            layer.self_attention = PagedSelfAttention(layer.self_attention, index, own)
        self._rotary = self._rotary_table(max_context)

    def _compute(
        self, tokens: np.ndarray, positions: np.ndarray, wanted: np.ndarray
    ) -> Tensor | None:
        hidden = self._hidden(tokens, positions)
        return self._logits(hidden[on_device(wanted, self.device)]) if len(wanted) else None

    def _hidden(self, tokens: np.ndarray, positions: np.ndarray) -> Tensor:
        """[T, hidden] after the last norm."""
        model = self.model
        sequence_parallel = model.config.sequence_parallel
        if sequence_parallel:  # equal parts for all ranks; what fills them up attends to nothing
            filler = -len(tokens) % self.group.size()
            tokens, positions = (np.pad(array, (0, filler)) for array in (tokens, positions))
        tokens_1T, positions_1T = (
            on_device(array, self.device).unsqueeze(0) for array in (tokens, positions)
        )
        hidden = model.embedding(input_ids=tokens_1T, position_ids=positions_1T)
        rotary = None if self._rotary is None else self._rotary[positions_1T[0]]
        hidden = model.decoder(hidden, attention_mask=None, rotary_pos_emb=rotary)
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.group
            )
        return hidden[: self.attentions[0].tokens, 0]

    def _logits(self, hidden_BH: Tensor) -> Tensor | None:
        """Logits of some tokens, gathered from the ranks' parts of the vocabulary to rank 0."""
        model = self.model
        weight = model.output_layer.weight
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        logits = F.linear(hidden_BH, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = soft_cap(logits, getattr(model.config, "final_logit_softcapping", None))
        if self.group.size() > 1:
            first = self.group.rank() == 0
            parts = [torch.empty_like(logits) for _ in range(self.group.size())] if first else None
            with purpose("logits"):
                dist.gather(logits, parts, group=self.group, group_dst=0)
            if parts is None:
                return None
            logits = torch.cat(parts, dim=-1)
        return logits[:, : self.vocab_size]

    def _rotary_table(self, positions: int) -> Tensor | None:
        """Angles [positions, 1, 1, rotary_dim]; None where the model has no rotary embedding."""
        kind = self.model.position_embedding_type
        if kind not in ("rope", "yarn"):
            return None
        with torch.inference_mode():
            table = self.model.rotary_pos_emb(positions)
            return (table[0] if kind == "yarn" else table).to(self.device)
