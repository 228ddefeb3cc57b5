"""What models of 2026 have beside ordinary attention, as sizes: linear or latent attention, two kinds of heads.

Linear attention is cut by its own heads, as ordinary tensor parallelism, and latent attention by its query
heads, with the latents once on all ranks that serve it. Segments cut the attention layers between them.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64  # tokens that a chunked scan of linear attention computes at once


@dataclass(frozen=True)
class Linear:
    """A layer of linear attention: a gated delta net (arXiv 2412.06464) or Mamba 2 (arXiv 2405.21060).

    heads: of its state. shares: what tensor parallelism deals to ranks, whole: key heads with their value
    heads, or heads. rows: of its input projections, columns: of the output projection's input. channels: of
    the convolution before it. key, value: dimensions of a head's keys and values. small: numbers of heads,
    norms and biases. groups: of heads with the same keys, each of which several ranks may have heads of; 0
    where each share has its own keys. normed: a gated norm over each group. state: elements of a sequence's
    state, all heads.
    """

    name: str
    heads: int
    shares: int
    rows: int
    columns: int
    channels: int
    kernel: int
    key: int
    value: int
    small: int
    groups: int = 0
    normed: bool = True

    @property
    def dealt(self) -> str:
        """What is dealt to ranks, as a reader calls it."""
        return f"{self.name} {'key ' if self.shares < self.heads else ''}heads"

    @property
    def state(self) -> int:
        return self.heads * self.key * self.value

    def parameters(self, hidden: int, tensor_parallel: int = 1) -> float:
        """Of one layer on one of so many ranks: projections, convolution, and what is small.

        Where ranks share groups, the convolution and its bias are whole on each.
        """
        ranks = self.ranks(tensor_parallel)
        cut = (self.rows + self.columns) * hidden + self.channels * self.kernel + self.small
        whole = self.channels * (self.kernel + 1) if self.sharing(tensor_parallel) > 1 else 0
        return (cut - whole) / ranks + whole

    def states(self, tensor_parallel: int, element: int) -> float:
        """Bytes of a sequence on one of so many ranks: fp32 states, and what the convolution sees."""
        ranks, keys = self.ranks(tensor_parallel), 2 * self.key
        channels = (self.channels - keys * self.groups) / ranks
        channels += keys * max(self.groups / ranks, min(self.groups, 1))
        return 4.0 * self.state / ranks + element * channels * self.kernel

    def ranks(self, tensor_parallel: int) -> int:
        """On how many of so many ranks `helix serve` deals it: on all of them, or each holds all of it."""
        tp, groups = tensor_parallel, self.groups
        whole = self.shares % tp or (groups and (groups % tp and tp % groups))
        return 1 if whole or groups * self.key % tp else tp

    def sharing(self, tensor_parallel: int) -> int:
        """How many of so many ranks have heads of one group."""
        return max(1, self.ranks(tensor_parallel) // self.groups) if self.groups else 1

    @property
    def scan_flops(self) -> float:
        """Of a token, forward: attention inside its chunk, and reading and writing the state. An estimate."""
        inside = CHUNK * (self.key + self.value)
        return 2.0 * self.heads * (inside + 2 * self.key * self.value)


def gated_delta_net(key_heads: int, value_heads: int, key: int, value: int, kernel: int) -> Linear:
    """As Qwen3-Next and Qwen3.5 have it: queries, keys, values, gate, and two numbers for each head."""
    keys, values = key_heads * key, value_heads * value
    rows = 2 * keys + 2 * values + 2 * value_heads
    name = "gated delta net"
    channels = 2 * keys + values
    small = 2 * value_heads + value
    return Linear(name, value_heads, key_heads, rows, values, channels, kernel, key, value, small)


def mamba2(
    heads: int, dims: int, groups: int, state: int, kernel: int, *, norm: bool = True
) -> Linear:
    """As Nemotron-H has it: gate, inputs, and for each group what writes and reads the state."""
    inner, channels = heads * dims, heads * dims + 2 * groups * state
    rows = inner + channels + heads
    small = 3 * heads + channels + inner * norm
    return Linear(
        "Mamba 2", heads, heads, rows, inner, channels, kernel, state, dims, small, groups, norm
    )


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    query_rank, kv_rank: of the compressions; 0 where queries are not compressed. rope, nope: rotated and plain
    dimensions of queries and keys; value: dimensions of values.
    """

    query_rank: int
    kv_rank: int
    rope: int
    nope: int
    value: int

    @property
    def key(self) -> int:
        """Dimensions of a query and a key."""
        return self.rope + self.nope

    @property
    def cached(self) -> int:
        """Elements that a position leaves in a layer's cache: the latent, and one rotated key."""
        return self.kv_rank + self.rope

    def parameters(self, hidden: int, heads: int) -> tuple[int, int]:
        """(cut by tensor parallelism, whole on every rank) of one layer, without its norm."""
        queries, rank = heads * self.key, self.query_rank
        cut = (rank or hidden) * queries + self.kv_rank * heads * (self.nope + self.value)
        cut += heads * self.value * hidden
        whole = hidden * (rank + self.cached) + rank + self.kv_rank
        return cut, whole


@dataclass(frozen=True)
class Special:
    """What of a model the flags of Megatron's GPT do not say.

    linear, linear_layers: layers that have linear attention in place of attention; beside: next to it, as
    in Falcon-H1. separate: a layer is attention, or linear attention, or an MLP, as in Nemotron-H;
    attention_layers of them are the first. latent: attention of all layers. local: (key-value heads,
    dimensions) of layers with a window, where the others have other ones. values_are_keys: those others
    project no values (Gemma 4), which counts in parameters and not in time. expert_width: of what experts read
    and write, where that is not the hidden size. wide_router: transformers keeps the router's weights in fp32.
    """

    linear: Linear | None = None
    linear_layers: int = 0
    beside: bool = False
    separate: bool = False
    attention_layers: int = 0
    latent: Latent | None = None
    local: tuple[int, int] | None = None
    values_are_keys: bool = False
    expert_width: int = 0
    wide_router: bool = False

    @property
    def has_pattern(self) -> bool:
        """Whether Megatron trains its layers by a hybrid pattern, and so deals whole groups of Mamba heads."""
        return self.separate or bool(self.linear and self.linear.groups and not self.beside)

    @property
    def names(self) -> list[str]:
        """What no flag says of the model, as a reader calls it."""
        found = [self.linear.name] if self.linear else []
        found += ["latent attention"] if self.latent else []
        found += ["heads of two kinds"] if self.local else []
        found += ["experts behind a narrower projection"] if self.expert_width else []
        return found


ORDINARY = Special()
