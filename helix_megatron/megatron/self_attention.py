"""Self-attention on m × n ranks: stock `SelfAttention` on a virtual configuration.

`exact` with query layout `heads` is a gather right behind the projection: a rank then has whole query heads and
the whole key-value heads that they need, as an ordinary tensor parallel rank of a model with u·p key-value
heads. Norms, rotary embedding, core attention, sequence parallelism, recompute and the cache are stock.

Where queries are cut, too, rank (i, j) looks like a tensor parallel rank of a model with h·m query heads, g·m
key-value heads and d/m dimensions. `exact` then puts an exchange around the core attention and cuts norms and
rotary tables; `segment-local` *is* attention on that virtual configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import megatron.core
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron import parallel_state
from helix_megatron.core.collectives import gather
from helix_megatron.core.exchanges.gather_kv import gather_kv_heads, kv_heads_attended
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, listed
from helix_megatron.megatron.checkpoint import permuted
from helix_megatron.megatron.core_attention import build_exchanged, choose_core
from helix_megatron.megatron.flat_norm import FlatNorm, whole_key_columns
from helix_megatron.megatron.notices import say_once
from helix_megatron.megatron.qk_norm import PartitionedNorm, cut_norm
from helix_megatron.megatron.support import CUT, STOCK, refusal
from helix_megatron.megatron.transformer_config import attention_layout
from helix_megatron.versions import TESTED

PARTS = ("core_attention", "linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
"""The parts of Megatron's self-attention that can be cut; see `_refuse_unknown_parts`."""

RotaryTables = Tensor | tuple[Tensor, Tensor] | None


class VirtualSelfAttention(SelfAttention):
    """Stock self-attention over h·m heads of d/m dimensions."""

    layout: HeadLayout
    intra_head_group: ProcessGroup

    def __init__(
        self,
        config: Any,
        submodules: SelfAttentionSubmodules,
        *args: Any,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        pg_collection = parallel_state.with_intra_head_groups(pg_collection)
        layout, group = attention_layout(config), pg_collection.ihp
        _check_groups(layout, pg_collection)
        virtual = copy.copy(config)
        submodules = self._prepare(virtual, submodules, layout, group)
        super().__init__(virtual, submodules, *args, pg_collection=pg_collection, **kwargs)
        self.layout, self.intra_head_group = layout, group

    def _prepare(
        self,
        virtual: Any,
        submodules: SelfAttentionSubmodules,
        layout: HeadLayout,
        group: ProcessGroup,
    ) -> SelfAttentionSubmodules:
        """Make the copy of the configuration virtual, and the submodules fit it, for the stock constructor."""
        virtual.num_attention_heads = layout.num_heads * layout.segments
        virtual.num_query_groups = layout.num_kv_heads * layout.segments
        virtual.kv_channels = layout.segment_dim
        return submodules

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """As stock; the rotary tables are those of the real head dimensions, and are cut here."""
        context = kwargs.get("inference_context") or kwargs.get("inference_params")
        self._check_inference(context)
        say_once(getattr(self.core_attention, "notice", ""))
        if attention_mask is not None and context is None and self._is_only_causal(attention_mask):
            attention_mask = None
        kwargs["rotary_pos_emb"] = self._rotary_tables(kwargs.get("rotary_pos_emb"))
        return super().forward(hidden_states, attention_mask, **kwargs)

    def _check_inference(self, context: Any) -> None:
        if context is not None and not context.is_static_batching():
            raise refusal("inference_context", "dynamic", CUT)

    def _is_only_causal(self, mask: Tensor) -> bool:
        causal = self.attn_mask_type is AttnMaskType.causal and mask.size(-2) == mask.size(-1)
        return causal and getattr(self.config, "causal_masks_only", False)

    def _rotary_tables(self, tables: RotaryTables) -> RotaryTables:
        return self.own_rotary_tables(tables)

    def own_rotary_tables(self, tables: RotaryTables) -> RotaryTables:
        """The rotary tables of this rank's queries and of its segments of keys, [S, .., rotary_dim] each."""
        if tables is None:
            return None
        query, key = tables if isinstance(tables, tuple) else (tables, tables)
        for table in (query, key):
            if table is not None and table.size(-1) != self.layout.rotary_dim:
                raise HelixError(
                    f"the model's rotary embedding turns {table.size(-1)} dimensions of a head, and the "
                    f"layout was made for {self.layout.rotary_dim}. Set rotary_percent of the transformer "
                    "configuration to what GPTModel gets (0 without rotary embedding)."
                )
        return self._cut_rotary(query, key)

    def _cut_rotary(self, query: Tensor, key: Tensor) -> RotaryTables:
        raise AssertionError("each attention says how it cuts rotary tables")


class SegmentLocalSelfAttention(VirtualSelfAttention):
    """`segment-local`: ordinary attention with h·m heads of d/m dimensions. A different architecture.

    Its checkpoints are those of a stock model with that many heads.
    """

    def _cut_rotary(self, query: Tensor, key: Tensor) -> RotaryTables:
        # The frequencies of a head of d/m dimensions, base^(-2k·m/d), are every m-th of those of d.
        step = self.layout.segments
        if not self.config.rotary_interleaved:
            return query[..., ::step], key[..., ::step]
        pairs = (table.unflatten(-1, (-1, 2))[..., ::step, :].flatten(-2) for table in (query, key))
        return tuple(pairs)


class HelixSelfAttention(VirtualSelfAttention):
    """`exact`: equal to ordinary attention; exchanges among the ranks of a head group.

    What is built is one of the two subclasses, as the layout of the configuration says.
    """

    rotary_columns: Tensor

    def __new__(cls, *args: Any, **kwargs: Any) -> HelixSelfAttention:
        kind: type[HelixSelfAttention] = cls
        if cls is HelixSelfAttention:
            layout = attention_layout(kwargs["config"] if "config" in kwargs else args[0])
            whole = layout.query_layout == "heads"
            kind = WholeHeadsSelfAttention if whole else CutHeadsSelfAttention
        return super().__new__(kind)

    def __init__(
        self,
        config: Any,
        submodules: SelfAttentionSubmodules,
        *args: Any,
        kernel: AttentionKernel | None = None,
        **kwargs: Any,
    ) -> None:
        self._kernel = kernel
        super().__init__(config, submodules, *args, **kwargs)
        columns = torch.as_tensor(self.layout.rotary_columns(self.intra_head_group.rank()))
        self.register_buffer("rotary_columns", columns, persistent=False)

    def cut_query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Queries as the layout deals them, this rank's segments of keys and values, and the output gate.

        Normalised, not rotated: for caches that keep a key-value head once among the ranks of its group.
        """
        gate = self.config.attention_output_gate
        return self.get_query_key_value_tensors(hidden_states, None, output_gate=gate)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Stock keys, global shapes and order of rows and columns, whatever the layout."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        rank = self.pg_collection.tp.rank()
        rows, columns = self.layout.qkv_rows(rank), self.layout.proj_columns(rank)
        for name, axis, index in (
            ("linear_qkv.weight", 0, rows),
            ("linear_qkv.bias", 0, rows),
            ("linear_proj.weight", 1, columns),
        ):
            if f"{prefix}{name}" in state:
                sharded = state[f"{prefix}{name}"]
                state[f"{prefix}{name}"] = permuted(sharded, axis, index, len(sharded_offsets))
        return state

    @torch.no_grad()
    def clip_qk(self) -> None:
        """As stock: scale the rows of queries and keys of heads whose scores grow beyond the threshold.

        The largest score of a key-value head is that of all its query heads, which other ranks of the group
        have; each rank then scales its own rows.
        """
        layout, core, config = self.layout, self.core_attention, self.config
        if not config.qk_clip or core.current_max_attn_logits is None:
            raise ValueError("qk_clip is off, or no forward pass has recorded the largest scores")
        largest, group = core.current_max_attn_logits.float(), self.intra_head_group
        if largest.numel() == layout.group_heads:  # of a part of the batch
            largest = gather(largest, group, purpose="exchange/qk-clip").amax(0)
        else:
            largest = gather(largest, group, purpose="exchange/qk-clip").flatten()
        largest = largest.view(layout.group_kv_heads, -1).amax(1)
        shrink = (config.qk_clip_threshold / largest).clamp(max=1.0)

        rank, r = self.pg_collection.tp.rank(), layout.queries_per_kv_head
        rows = torch.as_tensor(layout.qkv_rows(rank), device=shrink.device) // layout.head_dim
        blocks = r * (2 if layout.output_gate else 1) + 2
        head, block = rows // blocks - layout.kv_heads(rank).start, rows % blocks
        power = (block < r) * config.qk_clip_alpha + (block == blocks - 2) * (
            1 - config.qk_clip_alpha
        )
        factor = (shrink[head] ** power).unsqueeze(1)
        weight = self.linear_qkv.weight
        for values in (getattr(weight, "main_param", None), weight):
            if values is not None:
                values.data.mul_(factor.to(values.dtype))
        core.current_max_attn_logits = None

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """As stock, which takes the sigmoid in fp32, but fp64 inputs keep their precision."""
        wide = torch.promote_types(gate.dtype, torch.float32)
        return (x * torch.sigmoid(gate.reshape(x.shape).to(wide))).to(x.dtype)

    def _cut_rotary(self, query: Tensor, key: Tensor) -> RotaryTables:
        if self.rotary_columns.device != key.device:
            self.rotary_columns = self.rotary_columns.to(key.device)
        cut = key[..., self.rotary_columns]
        if self.layout.query_layout == "segments":
            query = query[..., self.rotary_columns]
        return query, cut


class WholeHeadsSelfAttention(HelixSelfAttention):
    """Query layout `heads`: `gather-kv` right behind the projection; all that follows is stock."""

    q_layernorm: Any
    k_layernorm: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.q_layernorm, FlatNorm):
            rank = self.pg_collection.tp.rank()
            self.q_layernorm = self.q_layernorm.on(self.layout.query_rows(rank))
            self.k_layernorm = self.k_layernorm.on(whole_key_columns(self.layout, rank))

    def _prepare(
        self,
        virtual: Any,
        submodules: SelfAttentionSubmodules,
        layout: HeadLayout,
        group: ProcessGroup,
    ) -> SelfAttentionSubmodules:
        virtual.num_query_groups = kv_heads_attended(layout) * layout.num_ranks
        rows, build = layout.qkv_rows(0).size * layout.num_ranks, submodules.linear_qkv
        return dataclasses.replace(
            submodules,
            linear_qkv=lambda size, _, **arguments: build(size, rows, **arguments),
            core_attention=choose_core(submodules.core_attention, virtual, self._kernel),
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Tensor, ...]:
        """As stock: whole heads [S, B, heads, d] of queries, u keys, u values and, if it has one, the gate."""
        query, kv_SBG2C, *gate = self._project(hidden_states)
        key, value = gather_kv_heads(
            kv_SBG2C, self.layout, self.intra_head_group, purpose="exchange/gather-kv"
        )
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if self.config.test_mode:
            self.run_realtime_tests()
        return query, key, value, *gate

    def cut_query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        query, kv_SBG2C, *gate = self._project(hidden_states)
        key, value = kv_SBG2C.unbind(3)
        norm = self._cut_key_norm
        return query, key if norm is None else norm(key), value, *gate

    @functools.cached_property
    def _cut_key_norm(self) -> PartitionedNorm | FlatNorm | None:
        return cut_norm(self.k_layernorm, "k_layernorm", self)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Normalised queries, keys beside values [S, B, g/n, 2, d/m], and the gate where there is one."""
        layout = self.layout
        mixed, _ = self.linear_qkv(hidden_states)
        slots = [layout.queries_per_kv_head] * (2 if layout.output_gate else 1)
        blocks = mixed.unflatten(-1, (layout.group_kv_heads, -1, layout.segment_dim))
        *heads, kv_SBG2C = blocks.split([*slots, 2], dim=-2)
        query, *gate = (part.reshape(*part.shape[:2], -1, layout.head_dim) for part in heads)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        return query, kv_SBG2C, *(part.contiguous() for part in gate)

    def _check_inference(self, context: Any) -> None:
        heads = self.num_query_groups_per_partition
        pages = getattr(context, "num_attention_heads_per_partition", heads)
        if pages != heads:
            raise HelixError(
                f"the dynamic inference context has pages for {pages} key-value heads on each "
                f"rank, and a rank of this layout attends with {heads}. Make it of a copy of the configuration "
                f"with num_query_groups = {self.config.num_query_groups}, or use helix generate."
            )
        copies = self.config.num_query_groups // self.layout.num_kv_heads
        if context is not None and copies > 1:
            say_once(
                f"Megatron's inference keeps {copies} copies of every key-value head here; helix generate and "
                "helix serve keep one."
            )

    def _rotary_tables(self, tables: RotaryTables) -> RotaryTables:
        self.own_rotary_tables(tables)
        return tables


class CutHeadsSelfAttention(HelixSelfAttention):
    """Query layout `segments`: an exchange around the core attention; norms and rotary tables are cut."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse_unknown_parts(self)
        for name in ("q_layernorm", "k_layernorm"):
            setattr(self, name, cut_norm(getattr(self, name), name, self))

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """As stock; a gate is no view of the projection, which offloading frees."""
        *heads, last = super().get_query_key_value_tensors(*args, **kwargs)
        return *heads, last.contiguous() if len(heads) == 3 else last

    def _prepare(
        self,
        virtual: Any,
        submodules: SelfAttentionSubmodules,
        layout: HeadLayout,
        group: ProcessGroup,
    ) -> SelfAttentionSubmodules:
        super()._prepare(virtual, submodules, layout, group)
        if virtual.softmax_scale is None:
            virtual.softmax_scale = layout.head_dim**-0.5
        core_attention = functools.partial(
            build_exchanged,
            build=submodules.core_attention,
            layout=layout,
            group=group,
            kernel=self._kernel,
        )
        return dataclasses.replace(submodules, core_attention=core_attention)


def _check_groups(layout: HeadLayout, pg_collection: Any) -> None:
    tensor, intra_head = pg_collection.tp, pg_collection.ihp
    if tensor.size() != layout.num_ranks or intra_head.size() != layout.segments:
        raise HelixError(
            f"the configuration asks for {layout.head_groups} head groups of {layout.segments} ranks, and "
            f"the process groups are tensor parallel {tensor.size()}, intra-head parallel "
            f"{intra_head.size()}. Give tensor_model_parallel_size and intra_head_parallel_size alike to "
            "the configuration and to initialize_model_parallel."
        )
    assert intra_head.rank() == tensor.rank() % layout.segments, (
        "segments of a group are neighbours"
    )


def _refuse_unknown_parts(layer: HelixSelfAttention) -> None:
    """Raise unless all that the stock constructor has built is in `PARTS`.

    What a later Megatron adds might act on whole heads, and would act on segments here without a word. Plain
    settings are no parts: tests/megatron/test_host_settings.py compares those with what is known.
    """
    state = layer._modules | layer._parameters | layer._buffers | vars(layer)
    unknown = {
        name: type(value).__name__
        for name, value in state.items()
        if (callable(value) or isinstance(value, Tensor))
        and not isinstance(value, IdentityOp)
        and name not in (*PARTS, "_kernel", "rotary_columns")
    }
    if unknown:
        parts = (f"{name} ({kind})" for name, kind in sorted(unknown.items()))
        raise HelixError(
            f"self-attention of megatron-core {megatron.core.__version__} has {listed(parts)}, and Helix can "
            f"cut {listed(PARTS)} only.",
            remedy=(f"Try pip install '{TESTED['megatron-core'].requirement}'", *STOCK),
        )
