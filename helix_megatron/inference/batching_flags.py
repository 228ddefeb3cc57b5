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
        "how the ranks of a head group share keys and values: with batch a rank keeps whole heads of some "
        "sequences, with sequence whole heads of some positions, with segment a segment of each head of "
        "everything; with auto the cost model decides",
        choices=("auto", *NAMES),
    )
    page_size: int = setting(16, "how many positions a page of the cache has", at_most=MOST_NUMBER)
    cache_memory: float | None = setting(
        None,
        "how much memory a rank gives to keys and values, in GiB (default: as much as the longest contexts of "
        "all sequences need, as far as there is memory)",
        above=0,
    )
    max_context: int | None = setting(
        None,
        "how many tokens prompt and output of one sequence may have together (default: as many as the model "
        "was trained for)",
        at_most=MOST_NUMBER,
    )
    max_sequences: int = setting(
        64, "how many sequences are generated at the same time", at_most=MOST_NUMBER
    )
    prefill_chunk: int = setting(
        512,
        "how many tokens of prompts are computed in one step, beside one token of every other sequence",
        at_most=MOST_NUMBER,
    )
    no_prefix_caching: bool = setting(
        False,
        "compute every prompt whole; without this flag the keys and values of what earlier sequences begin "
        "with are used again, as long as there is memory to keep them",
    )
    explain: bool = setting(False, "print the choice of the cache layout and the size of the cache")

    def __post_init__(self) -> None:
        check_values(self)
