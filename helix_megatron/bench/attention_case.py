"""What `bench attention` compares: one attention layer, where stock Megatron has to gather its whole QKV."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from helix_megatron.bench.spawn import RANKS, SIZE
from helix_megatron.bench.timing import Samples
from helix_megatron.config import EXCHANGES, HelixConfig
from helix_megatron.core.exchanges import AttentionShape, Exchange, choose
from helix_megatron.core.layout import HeadLayout
from helix_megatron.errors import HelixError, divisors, listed
from helix_megatron.flags import check_values, setting
from helix_megatron.hardware import CPU

ELEMENT_SIZES = {"fp32": 4, "bf16": 2}
STOCK, STOCK_SDPA, HELIX, FREE = LAYERS = ("stock", "stock + SDPA", "helix", "exchange for free")
DEFAULT_CASES = ("16,2,4,64", "32,2,8,64", "8,1,8,128")


@dataclass(frozen=True)
class Case:
    """h query heads and g key-value heads of d dimensions on p > g ranks.

    Helix makes g head groups of m = p/g segments, the most groups that there can be.

    Raises:
        HelixError: numbers on which stock Megatron or Helix does not run.
    """

    heads: int
    kv_heads: int
    ranks: int
    head_dim: int
    sequence_length: int = setting(512, "tokens of a sequence")
    micro_batch_size: int = setting(2, "sequences")
    hidden_size: int = setting(
        None, "H·D when not given; models with fewer exist, such as Qwen3-0.6B with half of it"
    )
    exchange: str = setting(
        "auto", "what Helix exchanges; auto takes the cheapest that fits", choices=EXCHANGES
    )
    dtype: str = setting("fp32", "of weights and activations", choices=tuple(ELEMENT_SIZES))

    def __post_init__(self) -> None:
        check_values(self)
        h, g, p = self.heads, self.kv_heads, self.ranks
        if self.hidden_size is None:
            object.__setattr__(self, "hidden_size", h * self.head_dim)
        if p <= g:
            raise HelixError(
                f"case {self.name}: {g} key-value heads on {p} ranks need no Helix: every rank has whole "
                f"ones. Valid here: more than {g} ranks."
            )
        if p % g or h % p:
            valid = [k for k in divisors(h) if k > g and k % g == 0]
            raise HelixError(
                f"case {self.name}: stock Megatron needs ranks that divide the {h} query heads and are a "
                f"multiple of the {g} key-value heads. Valid numbers of ranks here: {listed(valid)}."
            )
        self.chosen  # noqa: B018 - a layout or an exchange that does not fit is refused here

    @classmethod
    def parse(cls, text: str, **settings: object) -> Case:
        """From `16,2,4,64`: query heads, key-value heads, ranks, head dimensions."""
        try:
            h, g, p, d = (
                read(n) for read, n in zip((SIZE, SIZE, RANKS, SIZE), text.split(","), strict=True)
            )
        except (argparse.ArgumentTypeError, ValueError):
            raise HelixError(
                f"case {text!r:.200} is not four positive whole numbers: query heads, key-value heads, ranks, "
                f"dimensions of a head. Ranks are at most {RANKS.largest}. Example: {DEFAULT_CASES[0]}."
            ) from None
        return cls(h, g, p, d, **settings)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{self.heads},{self.kv_heads},{self.ranks},{self.head_dim}"

    @property
    def qkv_rows(self) -> int:
        """Rows of the whole `linear_qkv`."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def helix(self) -> HelixConfig:
        return HelixConfig(self.ranks // self.kv_heads, exchange=self.exchange)

    @property
    def layout(self) -> HeadLayout:
        return self.helix.layout(self.heads, self.kv_heads, self.head_dim, self.ranks)

    @property
    def shape(self) -> AttentionShape:
        length, element = self.sequence_length, ELEMENT_SIZES[self.dtype]
        return AttentionShape(self.layout, self.micro_batch_size, length, length, element)

    @property
    def chosen(self) -> Exchange:
        """The exchange that runs."""
        return choose(self.shape, self.exchange, CPU)

    # ------------------------------------------------------ bytes per rank, forward and backward

    @property
    def stock_bytes(self) -> int:
        """2·(p−1)/p · (h + 2g) · T·d: all-gather of the QKV projection, reduce-scatter of its gradient."""
        tokens = self.sequence_length * self.micro_batch_size
        share = tokens * self.qkv_rows * ELEMENT_SIZES[self.dtype] // self.ranks
        return 2 * (self.ranks - 1) * share

    @property
    def helix_bytes(self) -> int:
        """The exchange's own formula, there and back."""
        return 2 * self.chosen.bytes(self.shape)


class Measured(NamedTuple):
    """One case, the same on every rank; the keys are names of layers.

    errors: largest relative difference from stock; attention_bytes, all_bytes: sent by one rank in forward and
    backward, without and with the all-reduces of tensor parallelism itself.
    """

    errors: dict[str, float]
    samples: dict[str, Samples]
    attention_bytes: dict[str, int]
    all_bytes: dict[str, int]
