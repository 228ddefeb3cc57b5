"""`gather-kv`: query heads are whole already; collect the key-value heads that they need.

The usual case for grouped-query attention: every rank computes h/p whole heads with any fused kernel, and only
keys and values cross, which are few. A rank that needs only some of its group's key-value heads receives only
those: each member sends another the segments that it needs (one all-to-all); where all need all, an all-gather.
Volume per rank: (m−1)/m · 2u · T·d, with u the key-value heads that a rank needs, at most g/n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from helix_megatron.core.exchanges.base import AttentionShape, LocalHeads, LocalInputs, WholeHeads
from helix_megatron.core.layout import HeadLayout, QueryLayout

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


class GatherKV(WholeHeads):
    name = "gather-kv"
    summary = "all-gather the segments of keys and values; queries are whole heads"
    query_layout: ClassVar[QueryLayout] = "heads"
    collective = "all-gather"
    output_in_order = True
    in_core = False

    def bytes(self, shape: AttentionShape) -> int:
        return kv_gather_bytes(shape)

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        return whole_local_heads(layout)

    def messages(self, shape: AttentionShape) -> int:
        return 1

    def enter(self, inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        x = inputs
        kv_SBG2C = torch.stack([x.k, x.v], dim=3)
        purpose = "exchange/gather-kv"
        key, value = gather_kv_heads(kv_SBG2C, x.layout, x.group, purpose=purpose)
        return x.q, key, value


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


def kv_heads_attended(layout: HeadLayout) -> int:
    """u, key-value heads with which every member's attention runs, its query head x with head x // (h/p/u).

    Those that it needs; or a copy for each of its query heads, where these straddle key-value heads unevenly.
    """
    heads, u = layout.group_heads // layout.segments, kv_heads_received(layout)
    for member in range(layout.segments):
        need = layout.kv_heads_needed(member)
        wanted = [head // layout.queries_per_kv_head for head in layout.dealt_heads(0, member)]
        if heads % u or len(need) != u or wanted != [need[x * u // heads] for x in range(heads)]:
            return heads
    return u


def attended_heads(layout: HeadLayout, member: int) -> list[int]:
    """The u key-value heads, counted inside the group, with which a member's attention runs."""
    dealt = layout.dealt_heads(0, member)
    heads = [head // layout.queries_per_kv_head for head in dealt]
    return heads[:: len(heads) // kv_heads_attended(layout)]


def gather_kv_heads(
    kv_SBG2C: Tensor,
    layout: HeadLayout,
    group: ProcessGroup,
    *,
    purpose: str,
    canonical: bool = True,
) -> tuple[Tensor, ...]:
    """Keys and values [S, B, u, D] of the u heads with which this member attends, each contiguous.

    Args:
        kv_SBG2C: this member's segments of the group's keys and values, side by side; or of either alone.
        canonical: the order of a head's dimensions; else segment by segment.
    """
    import torch

    from helix_megatron.core.collectives import gather, swap
    from helix_megatron.core.exchanges.segments import join, join_canonical

    needs = [layout.kv_heads_needed(member) for member in range(layout.segments)]
    received = needs[group.rank()]
    if kv_heads_received(layout) == layout.group_kv_heads:
        received = range(layout.group_kv_heads)
        kv_mSBG2C = gather(kv_SBG2C, group, purpose=purpose)
    else:
        sent = torch.stack([kv_SBG2C[:, :, need.start : need.stop] for need in needs])
        kv_mSBG2C = swap(sent, group, purpose=purpose)
    wanted = [head - received.start for head in attended_heads(layout, group.rank())]
    if wanted == list(range(wanted[0], wanted[-1] + 1)):
        kv_mSBG2C = kv_mSBG2C[:, :, :, wanted[0] : wanted[-1] + 1]
    else:  # a copy for each query head
        heads = kv_mSBG2C.unbind(3)
        kv_mSBG2C = torch.stack([heads[head] for head in wanted], dim=3)
    # One by one, so that keys can be freed once they are rotated, while values are kept.
    return tuple(
        join_canonical(part, layout) if canonical else join(part) for part in kv_mSBG2C.unbind(4)
    )
