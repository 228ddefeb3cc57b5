"""All exchanges. The choice, the planner, the graph and the benchmarks know them from here only."""

from __future__ import annotations

from helix_megatron.core.exchanges.all_to_all_batch import AllToAllBatch
from helix_megatron.core.exchanges.all_to_all_heads import AllToAllHeads
from helix_megatron.core.exchanges.all_to_all_sequence import AllToAllSequence
from helix_megatron.core.exchanges.base import AttentionCost, Exchange
from helix_megatron.core.exchanges.gather_kv import GatherKV
from helix_megatron.core.exchanges.gather_qk import GatherQK
from helix_megatron.core.exchanges.no_exchange import NoExchange
from helix_megatron.core.exchanges.score_reduce import ScoreReduce

EXACT: tuple[Exchange, ...] = (
    GatherKV(),
    AllToAllBatch(),
    AllToAllSequence(),
    AllToAllHeads(),
    GatherQK(),
    ScoreReduce(),
)
NO_EXCHANGE = NoExchange()
# By name, whatever the layout: of exact attention, and of ranks that have heads of their own.
COSTS: dict[str, AttentionCost] = {cost.name: cost for cost in (*EXACT, NO_EXCHANGE)}
