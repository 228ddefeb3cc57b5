"""`all-to-all-sequence`: swap segments of all queries for whole heads of some queries.

For micro-batches too small to deal out. Keys and values are gathered whole, queries and outputs are swapped.
Under a causal mask late queries see more keys, so member t takes blocks t and 2m−1−t of 2m (zigzag): every
member then sees the same number of (query, key) pairs.
Volume per rank: (m−1)/m · (2h/m + 2g)/n · T·d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.core.exchanges.base import AttentionShape, Exchange, LocalHeads, LocalInputs
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class AllToAllSequence(Exchange):
    name = "all-to-all-sequence"
    summary = "gather keys and values; swap query segments for whole heads of 1/m of the queries, and back"

    def _fits(self, shape: AttentionShape) -> str:
        blocks = _num_blocks(shape.causal, shape.layout.segments)
        if shape.query_length % blocks:
            return (
                f"{shape.query_length} queries cannot be dealt in {blocks} equal blocks to "
                f"{shape.layout.segments} ranks; their number must be a multiple of {blocks}"
            )
        return ""

    def bytes(self, shape: AttentionShape) -> int:
        layout, m = shape.layout, shape.layout.segments
        q_and_o = 2 * (m - 1) * shape.segment_bytes(shape.query_length, layout.group_heads) // m
        k_and_v = (m - 1) * shape.segment_bytes(shape.key_length, 2 * layout.group_kv_heads)
        return q_and_o + k_and_v

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        dim = layout.head_dim  # all heads of 1/m of the queries, and of all keys
        return LocalHeads(layout.group_heads / layout.segments, layout.group_kv_heads, dim, dim)

    def messages(self, shape: AttentionShape) -> int:
        return 3

    def run(self, inputs: LocalInputs) -> Tensor:
        import torch

        from helix_megatron.core.collectives import gather_async, swap
        from helix_megatron.core.exchanges.segments import cut, heads_first, join, sequence_first

        x, m, purpose = inputs, inputs.layout.segments, "exchange/all-to-all-sequence"
        queries, keys = x.q.size(0), x.k.size(0)
        dealt = _deal(m, x.mask.causal)
        length = queries // (m * len(dealt[0]))

        kv = gather_async(torch.cat([x.k, x.v], dim=2), x.group, purpose=purpose)
        order = [block for member in dealt for block in member]
        blocks = x.q.split(length)
        q_mLBHC = torch.cat([blocks[block] for block in order]).unflatten(0, (m, -1))
        q_BHLD = heads_first(join(swap(q_mLBHC, x.group, purpose=purpose)))
        k_BGSD, v_BGSD = heads_first(join(kv())).chunk(2, dim=1)

        outputs = []
        with x.dropout_state(False):
            for block, q_block in zip(dealt[x.segment], q_BHLD.split(length, dim=2), strict=True):
                start = block * length
                mask, seen = x.mask.block(start, start + length, queries, keys)
                outputs.append(
                    x.kernel(
                        q_block,
                        k_BGSD[:, :, seen],
                        v_BGSD[:, :, seen],
                        mask=mask,
                        scale=x.scale,
                        dropout=x.dropout,
                    )
                )
        o_LBHD = sequence_first(torch.cat(outputs, dim=2))
        o_mLBHC = swap(cut(o_LBHD, m), x.group, purpose=purpose)
        blocks = o_mLBHC.flatten(0, 1).split(length)
        return torch.cat([blocks[order.index(block)] for block in range(len(order))])


def _num_blocks(causal: bool, segments: int) -> int:
    return 2 * segments if causal else segments


def _deal(segments: int, causal: bool) -> list[list[int]]:
    """The blocks of queries that each member takes."""
    if causal:
        return [[t, 2 * segments - 1 - t] for t in range(segments)]
    return [[t] for t in range(segments)]
