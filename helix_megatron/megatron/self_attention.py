"""Self-attention on m × n ranks: stock `SelfAttention` on a virtual configuration.

To Megatron's layer, rank (i, j) looks like a tensor parallel rank of a model with h·m query heads, g·m
key-value heads and d/m dimensions. So projections, sequence parallelism, recompute and the cache are stock.
`exact` replaces the core attention and the norms of queries and keys, and names the order of rows and columns;
`segment-local` *is* attention on the virtual configuration.
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
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from helix_megatron import parallel_state
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, listed
from helix_megatron.megatron.checkpoint import permuted
from helix_megatron.megatron.core_attention import HelixCoreAttention
from helix_megatron.megatron.qk_norm import PartitionedNorm, norm_kind
from helix_megatron.megatron.support import STOCK, refuse_dynamic_inference
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
        virtual.num_attention_heads = config.num_attention_heads * layout.segments
        virtual.num_query_groups = config.num_query_groups * layout.segments
        virtual.kv_channels = layout.segment_dim
        submodules = self._prepare(virtual, config, submodules, layout, group)
        super().__init__(virtual, submodules, *args, pg_collection=pg_collection, **kwargs)
        self.layout, self.intra_head_group = layout, group

    def _prepare(
        self,
        virtual: Any,
        config: Any,
        submodules: SelfAttentionSubmodules,
        layout: HeadLayout,
        group: ProcessGroup,
    ) -> SelfAttentionSubmodules:
        """Last changes to the virtual configuration and the submodules before the stock layer is built."""
        return submodules

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        """As stock; the rotary tables are those of the real head dimensions, and are cut here."""
        context = kwargs.get("inference_context") or kwargs.get("inference_params")
        if context is not None and not context.is_static_batching():
            raise refuse_dynamic_inference()
        kwargs["rotary_pos_emb"] = self.own_rotary_tables(kwargs.get("rotary_pos_emb"))
        return super().forward(hidden_states, attention_mask, **kwargs)

    def own_rotary_tables(self, tables: RotaryTables) -> RotaryTables:
        """The rotary tables of queries and keys, [S, .., rotary_dim] each, as this rank applies them."""
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
    """`exact`: equal to ordinary attention; exchanges among the ranks of a head group."""

    rotary_columns: Tensor

    def __init__(
        self,
        config: Any,
        submodules: SelfAttentionSubmodules,
        *args: Any,
        kernel: AttentionKernel = sdpa,
        **kwargs: Any,
    ) -> None:
        self._kernel = kernel
        super().__init__(config, submodules, *args, **kwargs)
        _refuse_unknown_parts(self)
        columns = torch.as_tensor(self.layout.rotary_columns(self.intra_head_group.rank()))
        self.register_buffer("rotary_columns", columns, persistent=False)
        for name in ("q_layernorm", "k_layernorm"):
            setattr(self, name, self._norm(name, getattr(self, name)))

    def _prepare(
        self,
        virtual: Any,
        config: Any,
        submodules: SelfAttentionSubmodules,
        layout: HeadLayout,
        group: ProcessGroup,
    ) -> SelfAttentionSubmodules:
        if virtual.softmax_scale is None:
            virtual.softmax_scale = layout.head_dim**-0.5
        core_attention = functools.partial(
            HelixCoreAttention,
            layout=layout,
            group=group,
            exchange=config.helix.exchange,
            kernel=self._kernel,
        )
        return dataclasses.replace(submodules, core_attention=core_attention)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """As stock; queries come in whole heads where the layout deals them whole."""
        query, *others = super().get_query_key_value_tensors(*args, **kwargs)
        return query.reshape(*query.shape[:2], *self.layout.rank_query_shape), *others

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

    def _norm(self, name: str, built: nn.Module | None) -> PartitionedNorm | None:
        """The norm of cut heads that does what the one does that Megatron has built."""
        kind = norm_kind(built, name)
        if kind is None:
            return None
        return PartitionedNorm(
            kind,
            self.layout,
            self.intra_head_group,
            whole=name == "q_layernorm" and self.layout.query_layout == "heads",
            eps=getattr(built, "eps", self.config.layernorm_epsilon),
            zero_centered=self.config.layernorm_zero_centered_gamma,
            dtype=self.config.params_dtype,
            device=None if self.config.use_cpu_initialization else torch.cuda.current_device(),
        )


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
        and name not in (*PARTS, "_kernel")
    }
    if unknown:
        parts = (f"{name} ({kind})" for name, kind in sorted(unknown.items()))
        raise HelixError(
            f"self-attention of megatron-core {megatron.core.__version__} has {listed(parts)}, and Helix can "
            f"cut {listed(PARTS)} only.",
            remedy=(f"Try pip install '{TESTED['megatron-core'].requirement}'", *STOCK),
        )
