"""How the m ranks of a head group share the keys and values of its heads, and what a step exchanges for it.

A step computes T new tokens: one of every sequence that decodes, and chunks of prompts. This rank has segment j
of their keys and values, and a segment of their queries (or some query heads whole). A cache layout says where
whole keys and values are kept, so that nothing is kept twice, and what crosses between the ranks.

Letters as in `helix_megatron.core.layout`. Costs are those of one rank and one layer. The modules of this
package import torch only where they run, so that a planner can ask for costs without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from helix_megatron.core.caches.attention import StepAttention
from helix_megatron.core.exchanges.base import sent_bytes
from helix_megatron.core.layout import HeadLayout

Placement = Literal["one", "dealt", "all"]


@dataclass(frozen=True)
class DecodeShape:
    """A step in which `sequences` sequences with `context` positions each get one token.

    element_size: bytes of an element of keys, values and activations.
    value_dim: dimensions of a value, where they are not those of a key; with whole heads only.
    whole_keys: whether every member has new keys and values whole anyway, so that none of them is sent.
    latent: whether a value is a part of its key.
    """

    layout: HeadLayout
    sequences: int
    context: int
    element_size: int = 2
    value_dim: int | None = None
    whole_keys: bool = False
    latent: bool = False

    @property
    def query_bytes(self) -> float:
        """Of this rank's part of the queries of all sequences."""
        heads, dims = self.layout.rank_query_shape
        return self.sequences * heads * dims * self.element_size

    @property
    def output_shape(self) -> tuple[int, int]:
        """(heads, dimensions) of one rank's part of the output."""
        heads, dims = self.layout.rank_query_shape
        return heads, dims if self.value_dim is None else self.value_dim

    @property
    def output_bytes(self) -> float:
        """Of this rank's part of the outputs of all sequences."""
        heads, dims = self.output_shape
        return self.sequences * heads * dims * self.element_size

    @property
    def key_value_bytes(self) -> float:
        """That are sent of this rank's segments of the new keys and values of all sequences."""
        layout = self.layout
        if self.whole_keys:
            return 0.0
        return self.sequences * 2 * layout.group_kv_heads * layout.segment_dim * self.element_size

    @property
    def wide_size(self) -> int:
        """Bytes of an element of what is accumulated: at least fp32."""
        return max(4, self.element_size)

    def cache_bytes(self) -> float:
        """Of all keys and values of a head group."""
        layout = self.layout
        value = 0 if self.latent else self.value_dim or layout.head_dim
        per_position = layout.group_kv_heads * (layout.head_dim + value) * self.element_size
        return self.sequences * self.context * per_position


@dataclass(frozen=True)
class Collective:
    """A collective over the ranks of a head group.

    size: bytes as nccl-tests counts them (the whole input of an all-to-all, the tensor of an all-reduce).
    gathered: bytes of an all-gather that brings the same, which is sooner there where messages are small; 0
    where there is none.
    """

    name: str
    kind: str
    size: float
    gathered: float = 0.0


class CacheLayout(ABC):
    """One way to keep the cache: its costs, and the attention of a step that runs on it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    placement: ClassVar[Placement]
    attention: ClassVar[type[StepAttention]]

    @abstractmethod
    def collectives(self, shape: DecodeShape) -> tuple[Collective, ...]:
        """What one rank takes part in, in attention, in the order in which it runs."""

    def bytes(self, shape: DecodeShape) -> float:
        """Bytes that one rank sends in attention."""
        m = shape.layout.segments
        return sum(sent_bytes(c.kind, c.size, m) for c in self.collectives(shape))

    def read_bytes(self, shape: DecodeShape) -> float:
        """Bytes of the cache that the busiest rank reads."""
        return shape.cache_bytes() / shape.layout.segments

    def score_bytes(self, shape: DecodeShape) -> float:
        """Bytes of scores that are written to memory; 0 where a fused kernel is used."""
        return 0.0
