"""`none`: every segment is a head of its own. For `segment-local` attention, which exchanges nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.exchanges.base import AttentionShape, Exchange, LocalInputs

if TYPE_CHECKING:
    from torch import Tensor


class NoExchange(Exchange):
    name = "none"
    summary = "nothing: attention over h·m heads of d/m dimensions, a different architecture"

    def bytes(self, shape: AttentionShape) -> int:
        return 0

    def flops(self, shape: AttentionShape) -> int:
        layout = shape.layout
        return shape.flops(layout.group_heads, layout.segment_dim, layout.segment_dim)

    def messages(self, shape: AttentionShape) -> int:
        return 0

    def run(self, inputs: LocalInputs) -> Tensor:
        from helix_megatron.exchanges.segments import heads_first, sequence_first

        x = inputs
        with x.dropout_state(False):
            o_BHLC = x.kernel(
                heads_first(x.q),
                heads_first(x.k),
                heads_first(x.v),
                mask=x.mask,
                scale=x.scale,
                dropout=x.dropout,
            )
        return sequence_first(o_BHLC)
