"""The transformer layer whose traffic `bench traffic` counts, and the formulas for it."""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.config import HelixConfig
from helix_megatron.core.exchanges import AttentionShape, choose
from helix_megatron.errors import HelixError

ELEMENT_SIZE = 2  # bf16


@dataclass(frozen=True)
class Layer:
    """Attention and MLP on p tensor parallel ranks, of which m make a head group.

    Raises:
        HelixError: numbers on which Megatron or Helix does not run.
    """

    hidden_size: int
    heads: int
    kv_heads: int
    ffn_hidden_size: int
    ranks: int
    segments: int
    sequence_length: int
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.segments < 2:
            raise HelixError(
                f"{self.ranks} ranks with --intra-head-parallel-size 1 run stock attention, which exchanges "
                "nothing. Give 2 or more segments."
            )
        for flag, size, parts in (
            ("hidden-size", self.hidden_size, self.heads),
            ("hidden-size", self.hidden_size, self.ranks),
            ("ffn-hidden-size", self.ffn_hidden_size, self.ranks),
        ):
            if size % parts:
                raise HelixError(f"--{flag} {size} must be a multiple of {parts}.")
        if self.sequence_parallel and self.sequence_length % self.ranks:
            below = self.sequence_length // self.ranks * self.ranks
            raise HelixError(
                f"sequence parallelism cannot deal {self.sequence_length} tokens to {self.ranks} ranks. Try "
                f"--sequence-length {below + self.ranks}."
            )
        self.shape("auto", 1)  # a layout that does not fit is refused here

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def helix(self, exchange: str) -> HelixConfig:
        return HelixConfig(self.segments, exchange=exchange)

    def shape(self, exchange: str, batch: int) -> AttentionShape:
        """What attention works on if that exchange is asked for."""
        heads = (self.heads, self.kv_heads, self.head_dim)
        layout = self.helix(exchange).layout(*heads, self.ranks, rotary="none")
        length = self.sequence_length
        return AttentionShape(layout, batch, length, length, ELEMENT_SIZE)

    def exchange_bytes(self, exchange: str, batch: int) -> int:
        """What the exchange sends by its own formula, per rank, forward and backward."""
        shape = self.shape(exchange, batch)
        return 2 * choose(shape, exchange).bytes(shape)

    def tensor_parallel_bytes(self, batch: int) -> int:
        """What tensor parallelism sends by itself, per rank, forward and backward.

        Attention and MLP each all-reduce their output and the gradient of their input, 2·(p−1)/p of a hidden
        tensor each. With sequence parallelism these are a reduce-scatter and an all-gather of half as much,
        and backward gathers both inputs once more.
        """
        tensor = self.sequence_length * batch * self.hidden_size * ELEMENT_SIZE
        return (10 if self.sequence_parallel else 8) * (self.ranks - 1) * tensor // self.ranks
