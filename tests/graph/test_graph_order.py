"""Ranks that enter collectives in another order than the others fail a check; what runs does not."""

from __future__ import annotations

import pytest
from graph_runs import BASELINE, DEALT_EXPERTS, HELIX, reordered, traced

from helix_megatron.graph.checks import run_checks

ATTENTION = "decoder.layers.0.self_attention"


def test_opposite_order_within_one_group_fails():
    """Two gathers of equal shapes swap: nothing waits for ever, and ranks get what others did not mean."""
    first, second = (f"{ATTENTION}.{name}" for name in ("linear_proj", "linear_qkv"))
    graph = reordered(BASELINE, 1, (first, "all-gather"), (second, "all-gather"))
    failed = [result for result in run_checks(graph, balance=1.5) if not result.passed]
    assert [result.name for result in failed] == ["every cross-rank edge is a collective"]
    (problem, other) = failed[0].problems
    assert "its ranks are in different collectives: module is" in problem
    assert f"{first} on rank 0" in problem and f"{second} on rank 1" in problem
    assert f"{second} on rank 0" in other and f"{first} on rank 1" in other


def test_opposite_order_of_two_groups_fails():
    """A deadlock that no tensor shows: rank 0 gathers first, rank 1 exchanges, each waits for the other."""
    exchange, gather = ATTENTION, f"{ATTENTION}.linear_qkv"
    graph = reordered(DEALT_EXPERTS, 0, (exchange, "all-to-all"), (gather, "all-gather"))
    failed = [result for result in run_checks(graph, balance=1.5) if not result.passed]
    assert [result.name for result in failed] == ["acyclic"]
    assert "are on cycles or behind them" in failed[0].problems[0]


@pytest.mark.parametrize("run", [HELIX, BASELINE], ids=["helix", "baseline"])
def test_several_micro_batches_are_no_deadlock(run):
    """Pipeline stages overlap micro-batches: their messages interleave, and that must pass."""
    graph = traced(run, micro_batches=3)
    assert [str(one) for one in run_checks(graph, balance=1.5) if not one.passed] == []
