"""`gather-qk`: collect whole queries and keys, keep values cut.

Every member computes the same probabilities, softmax(Q Kᵀ), and applies them to its own segment of the values:
the output is its segment, and nothing returns. QKᵀ is repeated m times, but the kernel's accumulators are only
d/m wide, which lets very large heads (d = 512) use a fused kernel. Volume per rank: (m−1)/m · (h+g)/n · T·d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.core.exchanges.base import AttentionShape, Exchange, LocalHeads, LocalInputs
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class GatherQK(Exchange):
    name = "gather-qk"
    summary = "all-gather the segments of queries and keys; values stay cut"
    collective = "all-gather"

    def bytes(self, shape: AttentionShape) -> int:
        layout = shape.layout
        q = shape.segment_bytes(shape.query_length, layout.group_heads)
        k = shape.segment_bytes(shape.key_length, layout.group_kv_heads)
        return (layout.segments - 1) * (q + k)

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        heads, kv_heads = layout.group_heads, layout.group_kv_heads
        return LocalHeads(heads, kv_heads, layout.head_dim, layout.segment_dim)

    def messages(self, shape: AttentionShape) -> int:
        return 1 if shape.query_length == shape.key_length else 2

    def run(self, inputs: LocalInputs) -> Tensor:
        import torch

        from helix_megatron.core.collectives import gather
        from helix_megatron.core.exchanges.segments import heads_first, join, sequence_first

        x = inputs

        def whole(t_SBHC: Tensor) -> Tensor:
            return heads_first(join(gather(t_SBHC, x.group, purpose="exchange/gather-qk")))

        if x.same_length:
            q, k = whole(torch.cat([x.q, x.k], dim=2)).split([x.q.size(2), x.k.size(2)], dim=1)
        else:
            q, k = whole(x.q), whole(x.k)
        with x.dropout_state(True):
            o_BHLC = x.kernel(q, k, heads_first(x.v), mask=x.mask, scale=x.scale, dropout=x.dropout)
        return sequence_first(o_BHLC)
