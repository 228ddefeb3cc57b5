"""How the m ranks of a head group share the keys and values of its heads, and what a step exchanges for it.

A step computes T new tokens: one of every sequence that decodes, and chunks of prompts. This rank has segment j
of their keys and values, and a segment of their queries (or some query heads whole). A layout says where whole
keys and values are kept, so that nothing is kept twice, and what crosses between the ranks:

    batch      whole heads of some sequences         two all-to-alls, independent of the context
    sequence   whole heads of some positions         two all-to-alls, independent of the context
    segment    segments of all sequences             an all-reduce of scores, proportional to the context

Letters as in `helix_megatron.layout`. Costs are those of one rank and one layer. Starts without torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from helix_megatron.layout import HeadLayout

Placement = Literal["one", "dealt", "all"]


@dataclass(frozen=True)
class DecodeShape:
    """A step in which `sequences` sequences with `context` positions each get one token.

    element_size: bytes of an element of keys, values and activations.
    """

    layout: HeadLayout
    sequences: int
    context: int
    element_size: int = 2

    @property
    def query_bytes(self) -> float:
        """Of this rank's part of the queries of all sequences."""
        heads, dims = self.layout.rank_query_shape
        return self.sequences * heads * dims * self.element_size

    @property
    def key_value_bytes(self) -> float:
        """Of this rank's segments of the new keys and values of all sequences."""
        layout = self.layout
        return self.sequences * 2 * layout.group_kv_heads * layout.segment_dim * self.element_size

    @property
    def wide_size(self) -> int:
        """Bytes of an element of what is accumulated: at least fp32."""
        return max(4, self.element_size)

    def cache_bytes(self) -> float:
        """Of all keys and values of a head group."""
        layout = self.layout
        per_position = 2 * layout.group_kv_heads * layout.head_dim * self.element_size
        return self.sequences * self.context * per_position


class CacheLayout(ABC):
    """One way to keep the cache."""

    name: ClassVar[str]
    summary: ClassVar[str]
    placement: ClassVar[Placement]

    @abstractmethod
    def bytes(self, shape: DecodeShape) -> float:
        """Bytes that one rank sends in attention."""

    @abstractmethod
    def messages(self, layout: HeadLayout) -> int:
        """Collectives that one rank takes part in, in attention."""

    def read_bytes(self, shape: DecodeShape) -> float:
        """Bytes of the cache that the busiest rank reads."""
        return shape.cache_bytes() / shape.layout.segments

    def score_bytes(self, shape: DecodeShape) -> float:
        """Bytes of scores that are written to memory; 0 where a fused kernel is used."""
        return 0.0


class Batch(CacheLayout):
    """Whole heads of 1/m of the sequences (Pope et al. 2022, arXiv 2211.05102, section 3.3)."""

    name = "batch"
    summary = "whole heads of 1/m of the sequences on each rank"
    placement = "one"

    def bytes(self, shape: DecodeShape) -> float:
        m = shape.layout.segments
        return (m - 1) / m * (2 * shape.query_bytes + shape.key_value_bytes)

    def messages(self, layout: HeadLayout) -> int:
        return 2

    def read_bytes(self, shape: DecodeShape) -> float:
        busiest = -(-shape.sequences // shape.layout.segments)
        return shape.cache_bytes() * busiest / shape.sequences


class Sequence(CacheLayout):
    """Whole heads of 1/m of the positions, block after block in turn; partial outputs merged by log-sum-exp.

    Helix parallelism (arXiv 2507.07120) does this with replicated projections; here they stay cut m ways.
    """

    name = "sequence"
    summary = "whole heads of 1/m of the positions on each rank, outputs merged by log-sum-exp"
    placement = "dealt"

    def bytes(self, shape: DecodeShape) -> float:
        m = shape.layout.segments
        heads, dims = shape.layout.rank_query_shape
        outputs = shape.sequences * heads * (dims + 1) * shape.wide_size
        return (m - 1) * (shape.query_bytes + shape.key_value_bytes / m + outputs)

    def messages(self, layout: HeadLayout) -> int:
        return 2


class Segment(CacheLayout):
    """Segments of all heads, sequences and positions: what megatron-core's static cache holds, too."""

    name = "segment"
    summary = "segments of everything on each rank, partial scores all-reduced"
    placement = "all"

    def bytes(self, shape: DecodeShape) -> float:
        m = shape.layout.segments
        dealt = 2 * shape.query_bytes if shape.layout.query_layout == "heads" else 0.0
        return (m - 1) / m * (2 * self.score_bytes(shape) + dealt)

    def messages(self, layout: HeadLayout) -> int:
        return 3 if layout.query_layout == "heads" else 1

    def score_bytes(self, shape: DecodeShape) -> float:
        scores = shape.sequences * shape.layout.group_heads * shape.context
        return scores * shape.wide_size


CACHE_LAYOUTS: tuple[CacheLayout, ...] = (Batch(), Sequence(), Segment())
NAMES = tuple(layout.name for layout in CACHE_LAYOUTS)


def cache_layout(name: str) -> CacheLayout:
    """The layout of that name."""
    return next(layout for layout in CACHE_LAYOUTS if layout.name == name)
