"""One rank's share of a step: embedding, layers, cache and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as megatron_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron import parallel_state
from helix_megatron.core.caches import SEGMENTS, cache_layout
from helix_megatron.core.caches.attention import LocalAttention, StepAttention
from helix_megatron.core.caches.book import PageBook
from helix_megatron.core.caches.paged import PagedCache, on_device
from helix_megatron.core.caches.pages import PageTables
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.observe import purpose
from helix_megatron.errors import HelixError
from helix_megatron.inference.layer import PagedSelfAttention
from helix_megatron.inference.step import StepPlan


class Runner:
    """A model with a paged cache on this rank.

    Args:
        model: a `GPTModel` in eval mode, all its layers on this rank's tensor parallel group. Its
            self-attention layers are replaced.
        layout: how the model's heads are cut.
        cache: the name of a cache layout.
        pages: how many pages this rank's pool has.
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
        pages: int,
        page_size: int,
        max_context: int,
        vocab_size: int,
        attention: str = "exact",
    ) -> None:
        self.model, self.vocab_size = model, vocab_size
        self.group: ProcessGroup = megatron_state.get_tensor_model_parallel_group()
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
        placement = cache_layout(cache).placement
        members = 1 if local or placement == "all" else layout.segments
        self.tables = PageTables(members, page_size, dealt=placement == "dealt")
        self.cache = PagedCache(
            model.config.num_layers,
            pages,
            page_size,
            layout.group_kv_heads,
            kept_dims(layout, cache, local),
            self.dtype,
            self.device,
        )
        attention_of = LocalAttention if local else cache_layout(cache).attention
        self.attention: StepAttention = attention_of(layout, head_group, self.tables, self.cache)
        for index, layer in enumerate(model.decoder.layers):
            layer.self_attention = PagedSelfAttention(layer.self_attention, index, self.attention)
        self._rotary = self._rotary_table(max_context)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """Compute a step.

        Returns:
            On rank 0 of the tensor parallel group the logits of the tokens whose are wanted, piece by piece,
            [wanted, vocab_size] in at least fp32; None on other ranks, and where no piece wants any.
        """
        self._keep_tables(plan)
        if not plan.pieces:
            return None
        hidden = self._hidden(plan)
        ends = np.cumsum([len(piece.tokens) for piece in plan.pieces])
        wanted = [np.arange(end - p.wanted, end) for end, p in zip(ends, plan.pieces, strict=True)]
        rows = np.concatenate(wanted)
        if not len(rows):
            return None
        return self._logits(hidden[on_device(rows, self.device)])

    def _keep_tables(self, plan: StepPlan) -> None:
        for sequence in plan.drops:
            if sequence in self.tables:  # it may have come and gone between two steps
                self.tables.drop(sequence)
        for piece in plan.pieces:
            if piece.sequence not in self.tables:
                self.tables.add(piece.sequence, piece.member)
            self.tables.extend(piece.sequence, piece.pages)

    def _hidden(self, plan: StepPlan) -> Tensor:
        """[T, hidden] after the last norm."""
        model = self.model
        tokens = np.concatenate([piece.tokens for piece in plan.pieces])
        positions = np.concatenate([np.arange(p.start, p.stop) for p in plan.pieces])
        sequence_parallel = model.config.sequence_parallel
        if sequence_parallel:  # equal parts for all ranks; what fills them up attends to nothing
            filler = -len(tokens) % self.group.size()
            tokens, positions = (np.pad(array, (0, filler)) for array in (tokens, positions))
        tokens_1T, positions_1T = (
            torch.from_numpy(array).to(self.device).unsqueeze(0) for array in (tokens, positions)
        )
        self.attention.prepare(plan.pieces)
        hidden = model.embedding(input_ids=tokens_1T, position_ids=positions_1T)
        rotary = None if self._rotary is None else self._rotary[positions_1T[0]]
        hidden = model.decoder(hidden, attention_mask=None, rotary_pos_emb=rotary)
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.group
            )
        return hidden[: self.attention.tokens, 0]

    def _logits(self, hidden_BH: Tensor) -> Tensor | None:
        """Logits of some tokens, gathered from the ranks' parts of the vocabulary to rank 0."""
        model = self.model
        weight = model.output_layer.weight
        if model.share_embeddings_and_output_weights:
            weight = model.shared_embedding_or_output_weight()
        logits = F.linear(hidden_BH, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
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
        if self.model.position_embedding_type != "rope":
            return None
        with torch.inference_mode():
            return self.model.rotary_pos_emb(positions).to(self.device)


def rank_layout(layout: HeadLayout, ranks: int) -> HeadLayout:
    """The same for stock attention, too, whose ranks are head groups of one rank."""
    return dataclasses.replace(layout, head_groups=ranks // layout.segments)


def is_local(layout: HeadLayout, attention: str) -> bool:
    """Whether each rank attends by itself, so that all cache layouts are one."""
    return layout.segments == 1 or attention == "segment-local"


def kept_dims(layout: HeadLayout, cache: str, local: bool) -> int:
    """Dimensions of a key or value as a rank keeps it: of a whole head, or of a segment."""
    return layout.segment_dim if local or cache == SEGMENTS else layout.head_dim


def make_book(
    cache: str, members: int, pages: int, page_size: int, *, shares: bool = True
) -> PageBook:
    """Rank 0's book for a cache layout over `members` ranks of a head group."""
    placement = cache_layout(cache).placement
    pools = 1 if placement == "all" else members
    return PageBook(pools, pages, page_size, dealt=placement == "dealt", shares=shares)
