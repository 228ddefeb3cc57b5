"""What `bench decode` measures: a decode step by each contestant, and the bytes that it should send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from helix_megatron.bench.timing import Samples
from helix_megatron.config import QUERY_LAYOUTS, HelixConfig
from helix_megatron.core.caches import NAMES, DecodeShape, cache_layout
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.flags import check_values, setting

STOCK, STOCK_PAGED = "stock", "stock, paged"
CONTESTANTS = (*NAMES, STOCK, STOCK_PAGED)
ELEMENT_SIZE = 4  # fp32


@dataclass(frozen=True)
class DecodeCase:
    """h query heads and g key-value heads of d dimensions on p > g ranks, m of which share a head group.

    context counts the new token itself; without one before it there is nothing in the cache.

    Raises:
        HelixError: numbers on which stock Megatron or a cache layout does not run.
    """

    heads: int = setting(8, "query heads")
    kv_heads: int = setting(1, "key-value heads, fewer than ranks")
    ranks: int = setting(4, "tensor parallel ranks")
    segments: int = setting(
        None,
        "segments of a head, which share one copy of its cache; ranks / key-value heads if not given",
    )
    head_dim: int = setting(128, "dimensions of a head")
    hidden_size: int = setting(1024, "of the model")
    layers: int = setting(2, "of the model")
    sequences: int = setting(8, "that get one token each")
    context: int = setting(8192, "positions that a token attends to", at_least=2, is_flag=False)
    query_layout: str = setting(
        "auto", "heads deals query heads whole, segments cuts them", choices=QUERY_LAYOUTS
    )

    def __post_init__(self) -> None:
        check_values(self)
        h, g, p = self.heads, self.kv_heads, self.ranks
        if p <= g or p % g or h % p:
            valid = [k for k in divisors(h) if k > g and k % g == 0]
            raise HelixError(
                f"--ranks {p}: compared is where stock Megatron gathers QKV and replicates its cache, which "
                f"needs more ranks than the {g} key-value heads, a multiple of them that divides the {h} query "
                f"heads. Valid here: {listed(valid)}."
            )
        m = self.helix.intra_head_parallel_size
        fitting = [k for k in divisors(p) if g % (p // k) == 0]
        if m not in fitting:
            raise HelixError(
                f"--segments {m} does not make head groups of {p} ranks and {g} key-value heads. "
                f"Valid: {listed(fitting)}."
            )
        self.layout  # noqa: B018 - a head that cannot be cut so is refused here
        if self.sequences % m:
            raise HelixError(
                f"--sequences {self.sequences} cannot be dealt evenly to the {m} ranks of a head group. "
                f"Valid: multiples of {m}."
            )

    @property
    def helix(self) -> HelixConfig:
        m = self.ranks // self.kv_heads if self.segments is None else self.segments
        return HelixConfig(m, query_layout=self.query_layout)

    @property
    def layout(self) -> HeadLayout:
        return self.helix.layout(self.heads, self.kv_heads, self.head_dim, self.ranks)

    @property
    def shape(self) -> DecodeShape:
        return DecodeShape(self.layout, self.sequences, self.context, ELEMENT_SIZE)

    @property
    def copy_bytes(self) -> int:
        """Of every key and value once."""
        each = self.layers * self.sequences * self.context * self.kv_heads * self.head_dim
        return 2 * each * ELEMENT_SIZE

    def sent_bytes(self, name: str) -> float:
        """That a rank sends in attention per token, on average over ranks, by formula."""
        if name in NAMES:
            return self.layers * cache_layout(name).bytes(self.shape) / self.sequences
        row = (self.heads + 2 * self.kv_heads) * self.head_dim * ELEMENT_SIZE
        return self.layers * row * (self.ranks - 1) / self.ranks


class Measured(NamedTuple):
    """One case, the same on every rank; the keys are names of contestants.

    differences: of logits from stock's, of the largest. sent_bytes: in attention in one step; cache_bytes: keys
    and values; both of all ranks together.
    """

    differences: dict[str, float]
    samples: dict[str, Samples]
    sent_bytes: dict[str, int]
    cache_bytes: dict[str, int]
