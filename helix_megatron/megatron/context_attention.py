"""Core attention for context parallelism and packed sequences where there is no Transformer Engine.

`ContextParallelAttention` is Megatron's `DotProductAttention`, which knows neither, with another forward pass:
it gathers keys and values over the context-parallel group, and calls torch's `scaled_dot_product_attention` on
whole heads.
"""

from __future__ import annotations

import copy
import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError, Setting
from helix_megatron.megatron.context_parallel import documents_of, over_context
from helix_megatron.megatron.core_attention import CAUSAL
from helix_megatron.megatron.norms import with_classes

COMMUNICATION = "all_gather"
"""The one `cp_comm_type` of this attention, of those that Transformer Engine's has."""


class ContextParallelAttention(DotProductAttention):
    """Exact attention over a context-parallel group of any size, and over the documents of packed sequences.

    Unlike Megatron's it honours the mask type as well as a mask tensor: what either hides is hidden. A mask
    tensor has this rank's queries and the keys of the whole sequence. Beside packed sequences, whose borders
    say it all, it is not read.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *args: Any,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        check_communication(cp_comm_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        alone = copy.copy(config)
        alone.context_parallel_size = 1  # the constructor refuses others
        super().__init__(alone, layer_number, *args, pg_collection=pg_collection, **kwargs)
        self.config = config
        # Megatron divides by the layer number before the softmax and multiplies by it inside.
        self.softmax_scale *= self.scale_mask_softmax.scale or 1
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, self.layer_number
        )
        self.window = tuple(config.window_size) if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """query [L, B, H, D], key and value [L, B, G, D], all without B if packed → [L, B, H·D]."""
        if attention_bias is not None:
            raise HelixError(
                "an attention bias needs Transformer Engine's attention; Megatron's own has none, and neither "
                "has this one. Leave attention_bias at None."
            )
        mask_type = attn_mask_type or self.attn_mask_type
        group, documents = self.pg_collection.cp, None
        if packed_seq_params is not None:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            group = packed_seq_params.cp_group or group
            documents, attention_mask = documents_of(packed_seq_params), None
        mask = AttentionMask(
            causal=mask_type in CAUSAL,
            window=self.window,
            hidden=None if mask_type is AttnMaskType.no_mask else attention_mask,
        )
        with self._dropout_state():
            output = over_context(
                query, key, value, self._attend, mask=mask, group=group, documents=documents
            )
        return output if documents is None else output.squeeze(1)

    def _attend(
        self, q_LBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, mask: AttentionMask
    ) -> Tensor:
        q_BHLD, k_BGSD, v_BGSD = (x.permute(1, 2, 0, 3) for x in (q_LBHD, k_SBGD, v_SBGD))
        kernel = (
            sdpa
            if self.softmax_offset is None
            else functools.partial(_with_sink, self.softmax_offset)
        )
        dropout = self.attention_dropout.p if self.training else 0.0
        o_BHLD = kernel(
            q_BHLD, k_BGSD, v_BGSD, mask=mask, scale=self.softmax_scale, dropout=dropout
        )
        return o_BHLD.permute(2, 0, 1, 3).flatten(2)

    def _dropout_state(self) -> AbstractContextManager[Any]:
        """As Megatron's: with sequence parallelism the whole block runs in this rank's own state already."""
        if self.config.sequence_parallel or not self.training or not self.attention_dropout.p:
            return nullcontext()
        return get_cuda_rng_tracker().fork()


def check_communication(cp_comm_type: Any) -> None:
    """Raise unless this attention can communicate as asked; None leaves it the choice."""
    asked = cp_comm_type if isinstance(cp_comm_type, list | tuple) else [cp_comm_type]
    if other := [name for name in asked if name not in (None, COMMUNICATION)]:
        raise HelixError(
            f"context parallelism communicates by {COMMUNICATION} without Transformer Engine, and {other[0]} "
            "is one of its ways.",
            setting="cp_comm_type",
            value=other[0],
            remedy=("Set ", Setting("cp_comm_type", COMMUNICATION), ", or leave it out."),
        )


def context_spec(spec: Any) -> Any:
    """A layer, block or stack spec with this attention in place of Megatron's own `DotProductAttention`."""
    return with_classes(spec, {DotProductAttention: ContextParallelAttention})


def _with_sink(
    sink_H: Tensor,
    q_BHLD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    dropout: float,
) -> Tensor:
    """An `AttentionKernel` whose softmax has one more term exp(sink): a key of score `sink` with value 0."""
    queries, keys = q_BHLD.size(2), k_BGSD.size(2)
    seen = mask.visible(queries, keys, q_BHLD.device)
    bias = q_BHLD.new_zeros(seen.shape).masked_fill(~seen, -torch.inf)
    bias = bias.expand(*(1,) * (4 - bias.dim()), *bias.shape)
    sink = sink_H.to(q_BHLD.dtype).view(1, -1, 1, 1)
    shape = (bias.size(0), sink_H.numel(), queries)
    scores = torch.cat((bias.expand(*shape, keys), sink.expand(*shape, 1)), dim=-1)
    return F.scaled_dot_product_attention(
        q_BHLD,
        F.pad(k_BGSD, (0, 0, 0, 1)),
        F.pad(v_BGSD, (0, 0, 0, 1)),
        attn_mask=scores,
        scale=scale,
        dropout_p=dropout,
        enable_gqa=q_BHLD.size(1) != k_BGSD.size(1),
    )
