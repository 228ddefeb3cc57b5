"""`all-to-all-batch`: swap segments of all sequences for whole heads of some sequences.

Before: this rank has segment j of the group's heads, for B sequences. One all-to-all later: the whole heads,
for B/m sequences. Attention is then ordinary, and a second all-to-all brings segments of the output back.
Volume per rank: (m−1)/m · (2h + 2g)/n · T·d/m. (Pope et al. 2022, arXiv 2211.05102, shard attention over the
batch in the same way for decoding.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from helix_megatron.core.exchanges.base import AttentionShape, LocalHeads, LocalInputs, WholeHeads
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class AllToAllBatch(WholeHeads):
    name = "all-to-all-batch"
    summary = "swap segments for whole heads of 1/m of the sequences, and back"
    divided: ClassVar[int] = 0

    def _fits(self, shape: AttentionShape) -> str:
        m = shape.layout.segments
        if shape.batch % m:
            return f"a micro-batch of {shape.batch} cannot be dealt to {m} ranks; it must be a multiple of {m}"
        return ""

    def bytes(self, shape: AttentionShape) -> int:
        layout = shape.layout
        q_and_o = 2 * shape.segment_bytes(shape.query_length, layout.group_heads)
        k_and_v = shape.segment_bytes(shape.key_length, 2 * layout.group_kv_heads)
        return (layout.segments - 1) * (q_and_o + k_and_v) // layout.segments

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        m = (
            layout.segments
        )  # all heads of 1/m of the sequences cost what 1/m of the heads of all do
        dim = layout.head_dim
        return LocalHeads(layout.group_heads / m, layout.group_kv_heads / m, dim, dim)

    def messages(self, shape: AttentionShape) -> int:
        return 2 if shape.query_length == shape.key_length else 3

    def enter(self, inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
        import torch

        from helix_megatron.core.collectives import swap
        from helix_megatron.core.exchanges.segments import join

        x, m = inputs, inputs.layout.segments

        def whole(t_SBHC: Tensor) -> Tensor:
            """[S, B, H, C] → [S, B/m, H, D]"""
            t_mSbHC = t_SBHC.unflatten(1, (m, -1)).movedim(1, 0)
            return join(swap(t_mSbHC, x.group, purpose="exchange/all-to-all-batch"))

        heads, kv_heads = x.q.size(2), x.k.size(2)
        if x.same_length:
            qkv = whole(torch.cat([x.q, x.k, x.v], dim=2))
            q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
        else:
            q = whole(x.q)
            k, v = whole(torch.cat([x.k, x.v], dim=2)).chunk(2, dim=2)
        return q, k, v

    def leave(self, o_LbHD: Tensor, inputs: LocalInputs) -> Tensor:
        from helix_megatron.core.collectives import swap
        from helix_megatron.core.exchanges.segments import cut

        o_mLbHC = cut(o_LbHD, inputs.layout.segments)
        o_mLbHC = swap(o_mLbHC, inputs.group, purpose="exchange/all-to-all-batch")
        return o_mLbHC.movedim(0, 1).flatten(1, 2)
