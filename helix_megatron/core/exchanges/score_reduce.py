"""`score-reduce`: sum partial scores, the literal picture of cutting a head's dimensions, made exact.

Q Kᵀ over d dimensions is the sum of the m segments' products, so an all-reduce of partial scores in fp32 before
the softmax gives every member the exact probabilities. No fused kernel can stop in the middle for that, and
scores grow with the square of the sequence: for very short sequences.
Volume per rank: 2(m−1)/m · B·(h/n)·L·S · 4 bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from helix_megatron.core.exchanges.base import AttentionShape, Exchange, LocalHeads, LocalInputs
from helix_megatron.core.layout import HeadLayout

if TYPE_CHECKING:
    from torch import Tensor


class ScoreReduce(Exchange):
    name = "score-reduce"
    summary = "all-reduce partial scores in fp32; no fused kernel"
    collective = "all-reduce"

    def bytes(self, shape: AttentionShape) -> int:
        m = shape.layout.segments
        return 2 * (m - 1) * self.score_bytes(shape) // m

    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        dim = layout.segment_dim
        return LocalHeads(layout.group_heads, layout.group_kv_heads, dim, dim)

    def messages(self, shape: AttentionShape) -> int:
        return 1

    def score_bytes(self, shape: AttentionShape) -> int:
        width = max(4, shape.element_size)  # fp64 inputs keep their precision
        pairs = shape.query_length * shape.key_length
        return shape.batch * shape.layout.group_heads * pairs * width

    def run(self, inputs: LocalInputs) -> Tensor:
        import torch

        from helix_megatron.core.collectives import all_reduce
        from helix_megatron.core.exchanges.segments import heads_first, sequence_first
        from helix_megatron.core.kernels.softcap import soft_cap
        from helix_megatron.core.masks import masked_softmax

        x = inputs
        groups = x.k.size(2)
        wide = torch.promote_types(x.q.dtype, torch.float32)
        q_BGRLC = heads_first(x.q).to(wide).unflatten(1, (groups, -1))
        k_BGSC, v_BGSC = heads_first(x.k).to(wide), heads_first(x.v)

        partial_BGRLS = q_BGRLC @ k_BGSC.transpose(2, 3).unsqueeze(2)
        scores_BHLS = all_reduce(partial_BGRLS, x.group, purpose="exchange/score-reduce").flatten(
            1, 2
        )
        scores_BHLS = soft_cap(scores_BHLS * x.scale, x.softcap)
        probabilities = masked_softmax(scores_BHLS, x.mask).to(x.v.dtype)
        if x.dropout:
            with x.dropout_state(True):
                probabilities = torch.nn.functional.dropout(probabilities, p=x.dropout)
        o_BGRLC = probabilities.unflatten(1, (groups, -1)) @ v_BGSC.unsqueeze(2)
        return sequence_first(o_BGRLC.flatten(1, 2))
