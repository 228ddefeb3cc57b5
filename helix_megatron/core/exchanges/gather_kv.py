"""`gather-kv`: query heads are whole already; collect the key-value heads that they need.

The usual case for grouped-query attention: every rank computes h/p whole heads with any fused kernel, and only
keys and values cross, which are few. A rank that needs only some of its group's key-value heads receives only
those: each member sends another the segments that it needs (one all-to-all); where all need all, an all-gather.
Volume per rank: (m−1)/m · 2u · T·d, with u the key-value heads that a rank needs, at most g/n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from helix_megatron.core.exchanges.base import AttentionShape, Exchange, LocalHeads, LocalInputs
from helix_megatron.core.layout import HeadLayout, QueryLayout

if TYPE_CHECKING:
    from torch import Tensor


class GatherKV(Exchange):
    name = "gather-kv"
    summary = "all-gather the segments of keys and values; queries are whole heads"
    query_layout: ClassVar[QueryLayout] = "heads"
    collective = "all-gather"
    output_in_order = True

    def bytes(self, shape: AttentionShape) -> int:
        return kv_gather_bytes(shape)

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        return whole_local_heads(layout)

    def messages(self, shape: AttentionShape) -> int:
        return 1

    def run(self, inputs: LocalInputs) -> Tensor:
        from helix_megatron.core.exchanges.segments import (
            heads_first,
            join_canonical,
            sequence_first,
        )

        x = inputs
        kv_mSBGC = gather_needed_kv(x, purpose="exchange/gather-kv")
        k_BGSD, v_BGSD = join_canonical(kv_mSBGC, x.layout).chunk(2, dim=1)
        first = x.segment * x.q.size(2)
        mask = x.mask.head_part(first, first + x.q.size(2))
        k_BGSD, v_BGSD = (match_heads(t, x.layout, x.segment) for t in (k_BGSD, v_BGSD))
        with x.dropout_state(False):
            o_BHLD = x.kernel(
                heads_first(x.q), k_BGSD, v_BGSD, mask=mask, scale=x.scale, dropout=x.dropout
            )
        return sequence_first(o_BHLD)


# Shared with all-to-all over heads, whose members hold the same heads after their exchange.


def kv_heads_received(layout: HeadLayout) -> int:
    """u, key-value heads that every member receives: what it needs, or all where the needs differ in size."""
    needs = [layout.kv_heads_needed(member) for member in range(layout.segments)]
    sizes = {len(need) for need in needs}
    return sizes.pop() if len(sizes) == 1 else layout.group_kv_heads


def whole_local_heads(layout: HeadLayout) -> LocalHeads:
    """Whole query heads, 1/m of the group's, and the key-value heads that they need."""
    kv_heads = max(1.0, layout.group_kv_heads / layout.segments)
    return LocalHeads(
        layout.group_heads / layout.segments, kv_heads, layout.head_dim, layout.head_dim
    )


def kv_gather_bytes(shape: AttentionShape) -> int:
    """Bytes that one rank sends so that every member has the key-value heads that it needs."""
    heads = 2 * kv_heads_received(shape.layout)
    return (shape.layout.segments - 1) * shape.segment_bytes(shape.key_length, heads)


def gather_needed_kv(inputs: LocalInputs, *, purpose: str) -> Tensor:
    """[m, S, B, 2u, C]: all segments of this member's u key heads, then of its u value heads."""
    import torch

    from helix_megatron.core.collectives import gather, swap

    k, v, layout = inputs.k, inputs.v, inputs.layout
    if kv_heads_received(layout) == layout.group_kv_heads:
        return gather(torch.cat([k, v], dim=2), inputs.group, purpose=purpose)
    needs = [layout.kv_heads_needed(member) for member in range(layout.segments)]
    parts = [
        torch.cat([k[:, :, need.start : need.stop], v[:, :, need.start : need.stop]], dim=2)
        for need in needs
    ]
    return swap(torch.stack(parts), inputs.group, purpose=purpose)


def match_heads(kv_BGSD: Tensor, layout: HeadLayout, member: int) -> Tensor:
    """The received key-value heads, so that this member's query head x attends to x // (H/G)."""
    need = layout.kv_heads_needed(member)
    received = range(layout.group_kv_heads) if kv_BGSD.size(1) == layout.group_kv_heads else need
    r = layout.queries_per_kv_head
    wanted = [head // r - received.start for head in layout.dealt_heads(0, member)]
    share = len(wanted) // len(need)
    if wanted == [need.start - received.start + x // share for x in range(len(wanted))]:
        return kv_BGSD[:, need.start - received.start : need.stop - received.start]
    return kv_BGSD[:, wanted]  # heads that straddle key-value heads unevenly: one copy each
