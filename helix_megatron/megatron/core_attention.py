"""The core attention of the replacement layer: Megatron's calling convention around `partitioned_attention`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.core.attention import partitioned_attention
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.layout import HeadLayout
from helix_megatron.core.masks import AttentionMask
from helix_megatron.errors import HelixError
from helix_megatron.megatron.random import fork_head_group_state
from helix_megatron.megatron.support import STOCK, refuse_packed_sequences

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)

WITHOUT_EFFECT = ("cp_comm_type", "pg_collection", "name", "pp_layer_offset")
"""What Megatron may give a core attention to build it, and the exchanges do not need."""


class HelixCoreAttention(MegatronModule):
    """Exact attention over segments, in the place of `DotProductAttention` or `TEDotProductAttention`.

    Unlike Megatron's local attention it honours the mask type as well as a mask tensor: what either hides is
    hidden. A query that sees no key gives zeros, where Megatron's gives the mean of all values.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        layout: HeadLayout,
        group: ProcessGroup,
        exchange: str,
        kernel: AttentionKernel,
        attention_dropout: float | None = None,
        **newer: Any,
    ) -> None:
        super().__init__(config=config)
        _refuse_unknown(
            {name: value for name, value in newer.items() if name not in WITHOUT_EFFECT}
        )
        self.layout, self.group, self.exchange, self.kernel = layout, group, exchange, kernel
        self.attn_mask_type = attn_mask_type
        # apply_query_key_layer_scaling divides by the layer number and multiplies back: nothing in fp32.
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, max(1, layer_number)
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
        **newer: Any,
    ) -> Tensor:
        """query, key, value as in `partitioned_attention`; attention_mask is True where hidden.

        Returns [S, B, h·d/p].
        """
        if packed_seq_params is not None:
            raise refuse_packed_sequences(packed_seq_params.qkv_format)
        if attention_bias is not None:
            raise HelixError(
                "an attention bias does not work with exact Helix attention. Leave attention_bias at None."
            )
        _refuse_unknown(newer)
        mask_type = attn_mask_type or self.attn_mask_type
        mask = AttentionMask(
            causal=mask_type in CAUSAL,
            window=self.window,
            hidden=None if mask_type is AttnMaskType.no_mask else attention_mask,
        )
        return partitioned_attention(
            query,
            key,
            value,
            layout=self.layout,
            group=self.group,
            mask=mask,
            scale=self.softmax_scale,
            exchange=self.exchange,
            dropout=self.dropout if self.training else 0.0,
            dropout_state=self._dropout_state,
            kernel=self.kernel,
        )

    def _dropout_state(self, shared: bool) -> AbstractContextManager[Any]:
        if not self.training or not self.dropout:
            return nullcontext()
        if shared:
            return fork_head_group_state()
        # With sequence parallelism the whole block runs in this rank's own state already.
        return nullcontext() if self.config.sequence_parallel else get_cuda_rng_tracker().fork()


def _refuse_unknown(given: dict[str, Any]) -> None:
    """What a later Megatron gives its core attention must not be dropped in silence."""
    for name, value in given.items():
        if value is not None:
            raise HelixError(
                f"Megatron gave its core attention {name} = {value!r}, which exact Helix attention does not "
                "know.",
                remedy=("Leave it at None", *STOCK),
            )
