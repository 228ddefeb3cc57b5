"""One frozen configuration; flags, a dictionary and Python are skins of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helix_megatron.core.layout import HeadLayout, QueryLayout, RotaryStyle
from helix_megatron.errors import HelixError, Setting, did_you_mean, divisors

ATTENTIONS = ("exact", "segment-local")
EXCHANGES = (
    "auto",
    "gather-kv",
    "all-to-all",
    "all-to-all-batch",
    "all-to-all-sequence",
    "all-to-all-heads",
    "gather-qk",
    "score-reduce",
)
QUERY_LAYOUTS = ("auto", "heads", "segments")
KERNELS = ("auto", "host", "sdpa")


def _setting(default: Any, help_text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True)
class HelixConfig:
    """How attention is partitioned. The fields' help texts are those of the command-line flags.

    Raises:
        HelixError: an unknown value, with the valid ones.
    """

    intra_head_parallel_size: int = _setting(
        1,
        "Segments m into which the dimensions of every attention head are cut. The tensor parallel "
        "ranks form n = TP/m head groups of m neighbours; n must divide the key-value heads. "
        "1 is stock attention.",
    )
    attention: str = _setting(
        "exact",
        "exact equals ordinary attention and exchanges data among the m ranks of a head group. "
        "segment-local exchanges nothing: it is a different architecture, with m times the heads of "
        "1/m the dimensions, for training from scratch.",
        ATTENTIONS,
    )
    exchange: str = _setting(
        "auto",
        "What exact attention exchanges inside a head group. auto takes the cheapest that fits.",
        EXCHANGES,
    )
    query_layout: str = _setting(
        "auto",
        "heads deals a group's query heads whole to its ranks and cuts only keys and values; segments "
        "cuts query heads too. auto takes heads where the query heads divide evenly.",
        QUERY_LAYOUTS,
    )
    kernel: str = _setting(
        "auto",
        "What computes exact attention on whole heads in a Megatron model: host is the core attention that "
        "the layer spec names, sdpa is torch's scaled_dot_product_attention. auto takes the host's, but "
        "sdpa in the place of Megatron's own unfused attention.",
        KERNELS,
    )

    def __post_init__(self) -> None:
        m = self.intra_head_parallel_size
        if not isinstance(m, int) or isinstance(m, bool) or m < 1:
            raise HelixError(
                f"intra-head parallel size {m!r} is not a whole number of at least 1. "
                "1 is stock attention; 2 halves every head.",
                setting="intra_head_parallel_size",
                value=m,
            )
        for name in ("attention", "exchange", "query_layout", "kernel"):
            value, choices = getattr(self, name), type(self).choices(name)
            if value not in choices:
                raise HelixError(
                    f"{name.replace('_', ' ')} {value!r} is unknown.",
                    setting=name,
                    value=value,
                    valid=choices,
                    remedy=did_you_mean(value, choices),
                )
        if self.attention == "segment-local" and self.exchange != "auto":
            raise HelixError(
                f"segment-local attention exchanges nothing, so exchange {self.exchange} has no "
                "meaning. Leave the exchange at auto, or take attention exact.",
                setting="exchange",
                value=self.exchange,
            )
        if self.attention == "segment-local" and self.query_layout == "heads":
            raise HelixError(
                "segment-local attention cuts query heads like key-value heads, so query layout heads "
                "has no meaning. Leave the query layout at auto, or take attention exact.",
                setting="query_layout",
                value="heads",
            )

    @classmethod
    def choices(cls, name: str) -> tuple[str, ...]:
        """The valid values of a setting that has a fixed list."""
        return {f.name: f.metadata["choices"] for f in dataclasses.fields(cls)}[name]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> HelixConfig:
        """From a mapping such as a block of a JSON file. Unknown keys are errors, with the nearest name."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in settings:
            if key not in names:
                raise HelixError(
                    f"unknown Helix setting {key!r}.",
                    setting=key,
                    valid=names,
                    remedy=did_you_mean(key, names),
                )
        return cls(**settings)

    @classmethod
    def from_args(cls, args: Any) -> HelixConfig:
        """From parsed command-line flags (`helix_megatron.arguments.add_helix_arguments`)."""
        return cls(
            intra_head_parallel_size=args.intra_head_parallel_size,
            attention=args.helix_attention,
            exchange=args.helix_exchange,
            query_layout=args.helix_query_layout,
            kernel=args.helix_kernel,
        )

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @property
    def active(self) -> bool:
        """Whether heads are cut at all."""
        return self.intra_head_parallel_size > 1

    def head_groups(self, tensor_parallel_size: int) -> int:
        """n = TP/m.

        Raises:
            HelixError: m does not divide the tensor parallel size.
        """
        m = self.intra_head_parallel_size
        if tensor_parallel_size % m:
            raise HelixError(
                f"intra-head parallel size {m} does not divide the tensor parallel size "
                f"{tensor_parallel_size}.",
                setting="intra_head_parallel_size",
                value=m,
                valid=divisors(tensor_parallel_size),
                remedy=(
                    "Or change ",
                    Setting("tensor_model_parallel_size"),
                    " to a multiple of it.",
                ),
            )
        return tensor_parallel_size // m

    def layout(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        tensor_parallel_size: int,
        *,
        rotary: RotaryStyle = "half",
        rotary_dim: int | None = None,
        output_gate: bool = False,
    ) -> HeadLayout:
        """The layout of an attention layer on `tensor_parallel_size` ranks.

        Raises:
            HelixError: the numbers do not fit.
        """
        n, m = self.head_groups(tensor_parallel_size), self.intra_head_parallel_size
        query_layout: QueryLayout = "segments"
        if self.query_layout == "heads":
            query_layout = "heads"
        elif self.query_layout == "auto" and self.attention == "exact":
            # An exchange asked for by name that moves query segments needs queries cut.
            whole = self.exchange in ("auto", "gather-kv") and num_heads % (n * m) == 0
            query_layout = "heads" if whole else "segments"
        return HeadLayout(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_groups=n,
            segments=m,
            query_layout=query_layout,
            rotary=rotary,
            rotary_dim=rotary_dim,
            output_gate=output_gate,
        )
