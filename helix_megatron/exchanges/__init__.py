"""The exchanges of exact attention, and their choice.

`choose` takes the cheapest that fits, or the one asked for; `explain` says why.
"""

from __future__ import annotations

from helix_megatron.exchanges.all_to_all_batch import AllToAllBatch
from helix_megatron.exchanges.all_to_all_heads import AllToAllHeads
from helix_megatron.exchanges.all_to_all_sequence import AllToAllSequence
from helix_megatron.exchanges.base import AttentionShape, Exchange, LocalInputs
from helix_megatron.exchanges.choice import Candidate, Machine, candidates, choose, explain
from helix_megatron.exchanges.gather_kv import GatherKV
from helix_megatron.exchanges.gather_qk import GatherQK
from helix_megatron.exchanges.none import NoExchange
from helix_megatron.exchanges.score_reduce import ScoreReduce

__all__ = [
    "AllToAllBatch",
    "AllToAllHeads",
    "AllToAllSequence",
    "AttentionShape",
    "Candidate",
    "Exchange",
    "GatherKV",
    "GatherQK",
    "LocalInputs",
    "Machine",
    "NoExchange",
    "ScoreReduce",
    "candidates",
    "choose",
    "explain",
]
