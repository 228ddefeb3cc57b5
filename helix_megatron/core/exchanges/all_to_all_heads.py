"""`all-to-all-heads`: swap segments of all the group's query heads for whole heads of some.

Needs the group's query heads to divide by m. Query layout `heads` reaches the same computation without moving
queries and outputs (`gather-kv`); this one is for layouts whose queries must stay cut.
Volume per rank: (m−1)/m · (2h/(n·m) + 2u) · T·d, with u the key-value heads that a rank needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.core.exchanges.base import AttentionShape, LocalHeads, LocalInputs, WholeHeads
from helix_megatron.core.exchanges.gather_kv import (
    gather_kv_heads,
    kv_gather_bytes,
    whole_local_heads,
)
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class AllToAllHeads(WholeHeads):
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

    def enter(self, inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        from helix_megatron.core.collectives import swap
        from helix_megatron.core.exchanges.segments import join

        x, purpose = inputs, "exchange/all-to-all-heads"
        q_mLBHC = x.q.unflatten(2, (x.layout.segments, -1)).movedim(2, 0)
        q_LBHD = join(swap(q_mLBHC, x.group, purpose=purpose))
        kv_SBG2C = torch.stack([x.k, x.v], dim=3)
        k, v = gather_kv_heads(kv_SBG2C, x.layout, x.group, canonical=False, purpose=purpose)
        return q_LBHD, k, v

    def leave(self, o_LbHD: Tensor, inputs: LocalInputs) -> Tensor:
        from helix_megatron.core.collectives import swap
        from helix_megatron.core.exchanges.segments import cut

        o_mLBHC = cut(o_LbHD, inputs.layout.segments)
        o_mLBHC = swap(o_mLBHC, inputs.group, purpose="exchange/all-to-all-heads")
        return o_mLBHC.permute(1, 2, 0, 3, 4).flatten(2, 3)
