"""Flags of the cache and of batching, for `helix generate` and `helix serve`. Starts without torch."""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.core.caches import NAMES
from helix_megatron.flags import check_values, setting

MOST_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class EngineOptions:
    """How sequences share the cache and the steps. The fields' help texts are those of the flags.

    Raises:
        HelixError: a number that cannot be.
    """

    cache_layout: str = setting(
        "auto",
        "how the ranks of a head group share keys and values: batch, whole heads of some sequences; "
        "sequence, whole heads of some positions; segment, segments of everything; auto lets the cost model "
        "decide",
        choices=("auto", *NAMES),
    )
    page_size: int = setting(16, "positions of a page", at_most=MOST_NUMBER)
    cache_memory: float | None = setting(
        None,
        "memory of a rank for keys and values, in GiB (default: what the longest contexts of all sequences "
        "need, as far as there is memory)",
        above=0,
    )
    max_context: int | None = setting(
        None,
        "tokens of prompt and output of one sequence (default: what the model was trained for)",
        at_most=MOST_NUMBER,
    )
    max_sequences: int = setting(
        64, "sequences that are generated at the same time", at_most=MOST_NUMBER
    )
    prefill_chunk: int = setting(
        512,
        "tokens of prompts that are computed in one step, beside one token of every other sequence",
        at_most=MOST_NUMBER,
    )
    explain: bool = setting(False, "print the choice of the cache layout and the size of the cache")

    def __post_init__(self) -> None:
        check_values(self)
