"""`all-to-all-heads`: swap segments of all the group's query heads for whole heads of some.

Needs the group's query heads to divide by m. Query layout `heads` reaches the same computation without moving
queries and outputs (`gather-kv`); this one is for layouts whose queries must stay cut.
Volume per rank: (m−1)/m · (2h/(n·m) + 2u) · T·d, with u the key-value heads that a rank needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.core.exchanges.base import AttentionShape, Exchange, LocalHeads, LocalInputs
from helix_megatron.core.exchanges.gather_kv import (
    gather_needed_kv,
    kv_gather_bytes,
    match_heads,
    whole_local_heads,
)
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class AllToAllHeads(Exchange):
    name = "all-to-all-heads"
    summary = (
        "swap query segments for 1/m of the heads, whole, gather their keys and values, and back"
    )

    def _fits(self, shape: AttentionShape) -> str:
        heads, m = shape.layout.group_heads, shape.layout.segments
        if heads % m:
            return f"the {heads} query heads of a head group cannot be dealt whole to {m} ranks"
        return ""

    def bytes(self, shape: AttentionShape) -> int:
        layout, m = shape.layout, shape.layout.segments
        q_and_o = 2 * (m - 1) * shape.segment_bytes(shape.query_length, layout.group_heads) // m
        return q_and_o + kv_gather_bytes(shape)

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        return whole_local_heads(layout)

    def messages(self, shape: AttentionShape) -> int:
        return 3

    def run(self, inputs: LocalInputs) -> Tensor:
        from helix_megatron.core.collectives import swap
        from helix_megatron.core.exchanges.segments import cut, join

        x, m, purpose = inputs, inputs.layout.segments, "exchange/all-to-all-heads"
        heads = x.q.size(2) // m
        q_BHLD = join(swap(x.q.unflatten(2, (m, heads)).movedim(2, 0), x.group, purpose=purpose))
        kv_BGSD = join(gather_needed_kv(x, purpose=purpose))
        k_BGSD, v_BGSD = (match_heads(t, x.layout, x.segment) for t in kv_BGSD.chunk(2, dim=1))

        mask = x.mask.head_part(x.segment * heads, (x.segment + 1) * heads)
        with x.dropout_state(False):
            o_BHLD = x.kernel(q_BHLD, k_BGSD, v_BGSD, mask=mask, scale=x.scale, dropout=x.dropout)
        o_mLBHC = swap(cut(o_BHLD, m), x.group, purpose=purpose)
        return o_mLBHC.permute(1, 2, 0, 3, 4).flatten(2, 3)
