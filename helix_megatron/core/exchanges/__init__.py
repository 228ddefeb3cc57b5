"""The exchanges of exact attention, and their choice.

`choose` takes the cheapest that fits, or the one asked for; `explain` says why.
"""

from __future__ import annotations

from helix_megatron.core.exchanges.base import (
    AttentionShape,
    Exchange,
    LocalInputs,
    WholeHeads,
    sent_bytes,
)
from helix_megatron.core.exchanges.choice import Candidate, candidates, choose, explain
from helix_megatron.core.exchanges.registry import COSTS, EXACT, NO_EXCHANGE

__all__ = [
    "COSTS",
    "EXACT",
    "NO_EXCHANGE",
    "AttentionShape",
    "Candidate",
    "Exchange",
    "LocalInputs",
    "WholeHeads",
    "candidates",
    "choose",
    "explain",
    "sent_bytes",
]
