"""`none`: nothing crosses. Every rank has heads of its own: whole ones (m = 1), or segments that are heads of
their own in `segment-local` attention, which is a different architecture."""

from __future__ import annotations

from helix_megatron.core.exchanges.base import AttentionCost, AttentionShape, LocalHeads
from helix_megatron.core.layout import HeadLayout


class NoExchange(AttentionCost):
    name = "none"
    output_in_order = True

    def bytes(self, shape: AttentionShape) -> int:
        return 0

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        dim = layout.segment_dim
        return LocalHeads(layout.group_heads, layout.group_kv_heads, dim, dim)

    def messages(self, shape: AttentionShape) -> int:
        return 0
