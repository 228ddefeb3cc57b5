"""What an exchange is: whether it fits, what it costs, and how it runs.

Shapes carry these letters: S, L sequence of keys, of queries; B batch; H, G query and key-value heads held
here; D dimensions of a head, C = D/m of a segment; m ranks of the head group.

Costs are those of one rank, one layer, the forward pass. The backward pass sends the same bytes again (each
collective's adjoint) and computes about twice the FLOPs. The modules of this package import torch only where
they run, so that a planner can ask for costs without it.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from helix_megatron.core.layout import HeadLayout, QueryLayout
from helix_megatron.core.masks import visible_range

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from helix_megatron.core.kernels import AttentionKernel
    from helix_megatron.core.masks import AttentionMask


def sent_bytes(kind: str, size: float, ranks: int) -> float:
    """Bytes that one rank sends in a collective with the usual bandwidth-optimal algorithm.

    Sizes as nccl-tests counts them: an all-gather's whole output, the whole input of a reduce-scatter or an
    all-to-all, the tensor of an all-reduce.
    """
    share = (ranks - 1) / ranks
    return 2 * share * size if kind == "all-reduce" else share * size


def _sum_of_positives(first: int, count: int) -> int:
    """The sum of those of `first`, `first` + 1, … (`count` numbers) that are above 0."""
    low, high = max(first, 0), first + count - 1
    return (low + high) * (high - low + 1) // 2 if high >= low else 0


@dataclass(frozen=True)
class AttentionShape:
    """All that decides whether an exchange fits and what it costs.

    element_size is in bytes.
    """

    layout: HeadLayout
    batch: int
    query_length: int
    key_length: int
    element_size: int = 2
    causal: bool = True
    window: tuple[int, int] | None = None

    @functools.cached_property
    def visible_pairs(self) -> int:
        """(query, key) pairs of one head of one sequence that causality and window show."""
        last = self.key_length - 1
        before, after = (-at for at in visible_range(0, causal=self.causal, window=self.window))
        first = max(last + 1 - self.query_length, after)  # those before it see no key
        queries = max(last + 1 - first, 0)
        hidden_before = _sum_of_positives(first - before, queries)
        hidden_after = _sum_of_positives(after, queries)
        return queries * (last + 1) - hidden_before - hidden_after

    def segment_bytes(self, length: int, heads: int) -> int:
        """Bytes of the segments that one rank holds of `heads` heads over `length` positions."""
        return self.batch * length * heads * self.layout.segment_dim * self.element_size

    def flops(
        self, heads: float, query_dim: int, value_dim: int, pairs: float | None = None
    ) -> int:
        """FLOPs of attention over `heads` heads of the whole batch; a multiply-add counts as two."""
        pairs = self.visible_pairs if pairs is None else pairs
        return round(2 * self.batch * heads * pairs * (query_dim + value_dim))


@dataclass
class LocalInputs:
    """One rank's part of an attention.

    q [L, B, H, C] with query layout `segments`, [L, B, h/p, D] with `heads`; k, v [S, B, G, C].
    `group` are the m ranks of the head group, `segment` is this rank's j among them.
    `dropout_state(shared)` enters the random state for dropout: shared by the head group where its ranks hold
    the same probabilities, this rank's own where they hold different ones.
    `softcap` makes softcap · tanh(score / softcap) of each score: `kernel` does it already.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: HeadLayout
    group: ProcessGroup
    segment: int
    mask: AttentionMask
    scale: float
    kernel: AttentionKernel
    dropout: float = 0.0
    dropout_state: Callable[[bool], AbstractContextManager[object]] = lambda shared: nullcontext()
    softcap: float | None = None

    @property
    def same_length(self) -> bool:
        """Whether queries and keys cover the same positions, so that they can travel together."""
        return self.q.size(0) == self.k.size(0)


@dataclass(frozen=True)
class LocalHeads:
    """What one rank's kernel computes: query heads, key-value heads, dimensions of queries and of values.

    Heads are fractions where a rank has all heads of a part of the sequences or queries.
    """

    heads: float
    kv_heads: float
    query_dim: int
    value_dim: int


class AttentionCost(ABC):
    """What attention costs one rank.

    collective: how most of the bytes move. output_in_order: whether the kernel's output is, for one sequence,
    already in the order that the projection reads. in_core: whether it runs inside core attention, which
    selective recomputation repeats.
    """

    name: ClassVar[str]
    collective: ClassVar[str] = "all-to-all"
    output_in_order: ClassVar[bool] = False
    in_core: ClassVar[bool] = True

    def supports(self, shape: AttentionShape) -> str:
        """Empty if that shape can run; else why not, as a clause."""
        return ""

    @abstractmethod
    def bytes(self, shape: AttentionShape) -> int:
        """Bytes that one rank sends in the forward pass of one layer."""

    @abstractmethod
    def local_heads(self, layout: HeadLayout) -> LocalHeads:
        """What one rank's kernel computes."""

    def flops(self, shape: AttentionShape) -> int:
        """FLOPs of one rank's local attention in the forward pass of one layer."""
        local = self.local_heads(shape.layout)
        # Scores that are written are computed for every pair, whatever the mask hides.
        pairs = shape.query_length * shape.key_length if self.score_bytes(shape) else None
        return shape.flops(local.heads, local.query_dim, local.value_dim, pairs)

    def messages(self, shape: AttentionShape) -> int:
        """Collectives that one rank takes part in, in the forward pass of one layer."""
        return 2

    def score_bytes(self, shape: AttentionShape) -> int:
        """Bytes of attention scores that are written to memory; 0 where a fused kernel can be used."""
        return 0


class Exchange(AttentionCost):
    """One way for the m ranks of a head group to compute exact attention together."""

    summary: ClassVar[str]
    query_layout: ClassVar[QueryLayout] = "segments"

    def supports(self, shape: AttentionShape) -> str:
        if shape.layout.query_layout != self.query_layout:
            return f"it needs query layout {self.query_layout}, and this is {shape.layout.query_layout}"
        return self._fits(shape)

    def _fits(self, shape: AttentionShape) -> str:
        return ""

    @abstractmethod
    def run(self, inputs: LocalInputs) -> Tensor:
        """This rank's attention output [L, B, heads, dimensions], in the shape of its queries."""


class WholeHeads(Exchange):
    """An exchange after which this rank has whole heads over all keys: any attention can run on them."""

    divided: ClassVar[int] = 1
    """Which dimension of a pattern [B, H, L, S] its m ranks share out: the batch (0) or the heads (1)."""

    @abstractmethod
    def enter(self, inputs: LocalInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [L, b, H, D], keys and values [S, b, G, D]: whole heads, contiguous."""

    def leave(self, o_LbHD: Tensor, inputs: LocalInputs) -> Tensor:
        """From this rank's part of the output to [L, B, heads, dimensions], in the shape of its queries."""
        return o_LbHD

    def own(self, pattern: Tensor | None, inputs: LocalInputs) -> Tensor | None:
        """This rank's part of a mask or bias of all its head group, broadcastable to [B, H, L, S]."""
        if pattern is None:
            return None
        pattern = pattern[(None,) * (4 - pattern.dim())]
        if pattern.size(self.divided) == 1:
            return pattern
        return pattern.chunk(inputs.layout.segments, self.divided)[inputs.segment]

    def run(self, inputs: LocalInputs) -> Tensor:
        from helix_megatron.core.exchanges.segments import heads_first, sequence_first

        x = inputs
        q, k, v = (heads_first(t) for t in self.enter(x))
        mask = dataclasses.replace(x.mask, hidden=self.own(x.mask.hidden, x))
        with x.dropout_state(False):
            o = x.kernel(q, k, v, mask=mask, scale=x.scale, dropout=x.dropout)
        return self.leave(sequence_first(o), x)
