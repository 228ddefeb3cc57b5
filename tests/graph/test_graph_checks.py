"""Each check of the operator graph passes on what runs, and fails on a graph that is broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from graph_runs import (
    BASELINE,
    DEALT_EXPERTS,
    EXPERTS,
    HELIX,
    LOCAL,
    PLAIN,
    SEGMENTS,
    forward,
    of_rank,
    traced,
)

from helix_megatron.graph.checks import balanced, run_checks
from helix_megatron.graph.model import Collective, Edge, Graph, Node, Spec

NAMES = [
    "acyclic",
    "shapes agree along every edge",
    "every operator on exactly one rank",
    "every cross-rank edge is a collective",
    "residuals present",
    "local dimensions sum to global ones",
    "balanced, largest over smallest rank",
    "every weight element on its ranks",
]


@pytest.mark.parametrize(
    "run",
    [HELIX, SEGMENTS, BASELINE, EXPERTS, DEALT_EXPERTS, LOCAL, PLAIN],
    ids=["helix", "segments", "baseline", "experts", "dealt-experts", "segment-local", "no-sp"],
)
def test_what_runs_passes_every_check(run):
    """The checks are for faults in layouts and traces; a layout that is right must pass them all."""
    results = run_checks(traced(run), balance=1.5)
    assert [result.name for result in results] == NAMES
    assert [str(result) for result in results if not result.passed] == []
    for result in results:
        assert str(result).startswith(f"passed  {result.name}: ")
        assert any(letter.isdigit() for letter in result.figure), "a figure without a number"


def test_figures_say_what_was_counted():
    """A check that looked at nothing would pass; its figure shows that it looked."""
    figures = {result.name: result.figure for result in run_checks(traced(HELIX))}
    assert figures["residuals present"] == "16 additions, 2 in each of 8 layers of ranks"
    dimensions = figures["local dimensions sum to global ones"]
    assert "linear_qkv 4 × 48 = 192" in dimensions
    assert "linear_fc2 4 × 64 = 256" in dimensions
    assert "sequence 4 × 4 = 16" in dimensions
    whole = {r.name: r.figure for r in run_checks(traced(PLAIN), balance=1.5)}
    assert "sequence 1 × 16 = 16" in whole["local dimensions sum to global ones"]
    graph = traced(HELIX)
    read = len({(edge.source, edge.output) for edge in graph.edges})
    made = sum(len(node.outputs) for node in graph.nodes)
    assert 0 < read < made
    shapes = figures["shapes agree along every edge"]
    assert shapes.startswith(f"{len(graph.edges):,} of {len(graph.edges):,} edges, ")
    assert shapes.endswith(f"; they read {read:,} of {made:,} tensors")
    assert "on 1 rank per element" in figures["every weight element on its ranks"]
    assert "no other edge between ranks" in figures["every cross-rank edge is a collective"]
    assert "4 ranks" in figures["every operator on exactly one rank"]


# -------------------------------------------------------------------- broken on purpose


def cycle(graph: Graph) -> None:
    """A product reads what is made of it."""
    edge = next(edge for edge in graph.edges if graph.node[edge.source].op == "aten.mm")
    graph.edges.append(Edge(edge.target, 0, edge.source, 0))


def crossed_collectives(graph: Graph) -> None:
    """Two ranks run two collectives in opposite order: they would wait for each other for ever."""
    whole = [one for one in graph.collectives if len(one.ranks) == 4]
    first, second = whole[0], whole[1]
    kept = list(first.members), list(second.members)
    kept[0][0], kept[1][0] = kept[1][0], kept[0][0]
    first.members, second.members = tuple(kept[0]), tuple(kept[1])


def other_shape(graph: Graph) -> None:
    (product,) = forward(graph, 1, "aten.mm", "decoder.layers.0.mlp.linear_fc1")
    product.outputs = (Spec((32, 63), "bf16"),)


def other_dtype(graph: Graph) -> None:
    (product,) = forward(graph, 1, "aten.mm", "decoder.layers.0.mlp.linear_fc1")
    product.outputs = (Spec(product.outputs[0].shape, "f32"),)


def no_source(graph: Graph) -> None:
    (product,) = forward(graph, 1, "aten.mm", "decoder.layers.0.mlp.linear_fc1")
    graph.edges = [edge for edge in graph.edges if edge.target != product.id]


def dangling_edge(graph: Graph) -> None:
    graph.edges.append(Edge("r0.999999", 0, graph.nodes[-1].id, 0))


def on_two_ranks(graph: Graph) -> None:
    node = next(node for node in graph.nodes if node.op == "aten.mm")
    node.ranks = (0, 1)


def on_no_rank(graph: Graph) -> None:
    next(node for node in graph.nodes if node.op == "aten.mm").ranks = ()


def same_id(graph: Graph) -> None:
    graph.nodes[5].id = graph.nodes[4].id


def idle_rank(graph: Graph) -> None:
    gone = {node.id for node in of_rank(graph, 2)}
    graph.nodes = [node for node in graph.nodes if node.id not in gone]
    graph.edges = [edge for edge in graph.edges if edge.target not in gone]


def shortcut(graph: Graph) -> None:
    """A tensor of rank 0 is read on rank 1, and nothing carried it there."""
    (product,) = forward(graph, 0, "aten.mm", "decoder.layers.0.mlp.linear_fc1")
    (other,) = forward(graph, 1, "aten.mm", "decoder.layers.0.mlp.linear_fc2")
    graph.edges.append(Edge(product.id, 0, other.id, 0))


def an_exchange(graph: Graph) -> Collective:
    return next(one for one in graph.collectives if one.purpose.startswith("exchange"))


def without_group(graph: Graph) -> None:
    an_exchange(graph).group = ""


def without_bytes(graph: Graph) -> None:
    an_exchange(graph).sent_bytes = 0


def wrong_ranks(graph: Graph) -> None:
    one = an_exchange(graph)
    one.ranks = tuple(rank + 1 for rank in one.ranks)


def wrong_bytes(graph: Graph) -> None:
    """Both say the same number of bytes, and the shapes say another."""
    one = next(one for one in graph.collectives if one.kind == "all-gather")
    for name in one.members:
        graph.node[name].sent_bytes *= 2
    one.sent_bytes *= 2


def missing_member(graph: Graph) -> None:
    one = next(one for one in graph.collectives if len(one.ranks) == 4)
    one.members = one.members[:-1]


def unjoined(graph: Graph) -> None:
    graph.collectives.pop()


def different_kinds(graph: Graph) -> None:
    graph.node[an_exchange(graph).members[0]].op = "all-gather"


def other_kind(graph: Graph) -> None:
    """The collective says another kind than all of its ranks."""
    an_exchange(graph).kind = "broadcast"


def other_purpose(graph: Graph) -> None:
    graph.node[an_exchange(graph).members[1]].purpose = "other"


def other_phase(graph: Graph) -> None:
    graph.node[an_exchange(graph).members[1]].phase = "gradients"


def other_micro_batch(graph: Graph) -> None:
    graph.node[an_exchange(graph).members[1]].micro_batch = 1


def lost_elements(graph: Graph) -> None:
    one = next(one for one in graph.collectives if one.kind == "reduce-scatter")
    graph.node[one.members[0]].outputs = (Spec((3, 2, 64), "bf16"),)


def no_residual(graph: Graph) -> None:
    """The MLP's output replaces what it should be added to."""
    additions = forward(graph, 2, "aten.add.Tensor", "decoder.layers.1")
    residual = [node for node in additions if node.module == "decoder.layers.1"][-1]
    graph.edges = [e for e in graph.edges if (e.target, e.input) != (residual.id, 0)]


def residual_of_something_else(graph: Graph) -> None:
    """The first residual adds attention's output to itself."""
    additions = forward(graph, 0, "aten.add.Tensor", "decoder.layers.0")
    residual = next(
        n for n in additions if n.module == "decoder.layers.0" and len(n.inputs[1].shape) > 1
    )
    edges = [edge for edge in graph.edges if edge.target == residual.id]
    graph.edges = [edge for edge in graph.edges if edge not in edges]
    branch = next(e for e in edges if e.input == 1)
    graph.edges += [branch, dataclasses.replace(branch, input=0)]


def narrow_product(graph: Graph) -> None:
    (product,) = forward(graph, 3, "aten.mm", "decoder.layers.0.self_attention.linear_qkv")
    product.outputs = (Spec((32, 47), "bf16"),)


def narrow_input(graph: Graph) -> None:
    (product,) = forward(graph, 3, "aten.mm", "decoder.layers.0.mlp.linear_fc2")
    product.inputs = (Spec((32, 63), "bf16"), *product.inputs[1:])


def short_sequence(graph: Graph) -> None:
    for node in forward(graph, 3, "aten.add.Tensor", "decoder.layers.0"):
        if node.module == "decoder.layers.0":
            node.outputs = (Spec((3, 2, 64), "bf16"),)


def no_addition_seen(graph: Graph) -> None:
    """An addition of another name: nothing shows how many tokens there are."""
    for node in graph.nodes:
        if node.op == "aten.add.Tensor":
            node.op = "aten.add.out"


def no_addition_on_one_rank(graph: Graph) -> None:
    """What three ranks of four show does not show the sequence."""
    for node in forward(graph, 2, "aten.add.Tensor", "decoder.layers.1"):
        node.op = "aten.add.out"


def no_ranks(graph: Graph) -> None:
    """A graph that says nothing of its ranks: there is nothing to add up."""
    graph.ranks.clear()


def missing_product(graph: Graph) -> None:
    (product,) = forward(graph, 3, "aten.mm", "decoder.layers.0.mlp.linear_fc2")
    product.op = "aten.clone"


def busy_rank(graph: Graph) -> None:
    for node in of_rank(graph, 1):
        node.flops *= 2


def heavy_rank(graph: Graph) -> None:
    for node in of_rank(graph, 1):
        node.bytes *= 2


def qkv_weight(graph: Graph, rank: int):
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    return next(w for w in graph.weights if w.rank == rank and w.name == name)


def swapped_weights(graph: Graph) -> None:
    """Two ranks hold each other's rows: shapes agree, elements do not."""
    one, other = qkv_weight(graph, 0), qkv_weight(graph, 1)
    one.runs, other.runs = other.runs, one.runs


def weight_in_other_order(graph: Graph) -> None:
    weight = qkv_weight(graph, 0)
    weight.runs = tuple(reversed(weight.runs))


def weight_nowhere(graph: Graph) -> None:
    graph.weights.remove(qkv_weight(graph, 2))


def weight_twice(graph: Graph) -> None:
    graph.weights.append(dataclasses.replace(qkv_weight(graph, 2)))


def unknown_weight(graph: Graph) -> None:
    weight = dataclasses.replace(
        qkv_weight(graph, 2), name="decoder.layers.7.mlp.linear_fc1.weight"
    )
    graph.weights.append(weight)


def whole_weight(graph: Graph) -> None:
    """A rank holds all of what it should hold a part of."""
    weight = qkv_weight(graph, 1)
    weight.axis, weight.runs, weight.spec = None, (), Spec(weight.shape, "bf16")


BROKEN: list[tuple[str, Callable[[Graph], None], str]] = [
    ("acyclic", cycle, "are on cycles or behind them"),
    ("acyclic", crossed_collectives, "are on cycles or behind them"),
    ("shapes agree along every edge", other_shape, "makes bf16[32, 63]"),
    ("shapes agree along every edge", other_dtype, "makes f32[32, 64]"),
    ("shapes agree along every edge", no_source, "nothing makes its inputs 0, 1"),
    ("shapes agree along every edge", dangling_edge, "ends at no node"),
    ("every operator on exactly one rank", on_two_ranks, "is on ranks [0, 1]"),
    ("every operator on exactly one rank", on_no_rank, "is on ranks [none]"),
    ("every operator on exactly one rank", same_id, "occurs twice"),
    ("every operator on exactly one rank", idle_rank, "rank 2 runs nothing"),
    ("every cross-rank edge is a collective", shortcut, "on rank 1 without a collective"),
    ("every cross-rank edge is a collective", without_group, "it has no group"),
    ("every cross-rank edge is a collective", without_bytes, "and it says 0"),
    ("every cross-rank edge is a collective", wrong_ranks, "its nodes are on [0, 1]"),
    ("every cross-rank edge is a collective", wrong_bytes, "and its shapes make"),
    ("every cross-rank edge is a collective", missing_member, "its nodes are on [0, 1, 2]"),
    ("every cross-rank edge is a collective", unjoined, "is part of 0 collectives"),
    ("every cross-rank edge is a collective", different_kinds, "op is all-gather on rank 0"),
    ("every cross-rank edge is a collective", other_kind, "runs all-to-all in"),
    ("every cross-rank edge is a collective", other_purpose, "purpose is exchange/"),
    ("every cross-rank edge is a collective", other_phase, "phase is forward on rank 0"),
    ("every cross-rank edge is a collective", other_micro_batch, "micro-batch is 0 on rank 0"),
    ("every cross-rank edge is a collective", lost_elements, "elements, and its ranks get"),
    ("residuals present", no_residual, "rank 2, layer 1: 0 additions of mlp's output"),
    (
        "residuals present",
        residual_of_something_else,
        "rank 0, layer 0: 0 additions of self_attention's",
    ),
    ("local dimensions sum to global ones", narrow_product, "sum to 191, and the whole is 192"),
    ("local dimensions sum to global ones", narrow_input, "sum to 255, and the whole is 256"),
    ("local dimensions sum to global ones", short_sequence, "4, 4, 4, 3 sum to 15"),
    ("local dimensions sum to global ones", no_addition_seen, "no residual addition shows its"),
    (
        "local dimensions sum to global ones",
        no_addition_on_one_rank,
        "rank 2, layer 1: no addition",
    ),
    ("local dimensions sum to global ones", no_ranks, "not checked: nodes or ranks are missing"),
    ("local dimensions sum to global ones", missing_product, "rank 3 multiplies by no"),
    ("balanced, largest over smallest rank", busy_rank, "flops: rank 1 has"),
    ("balanced, largest over smallest rank", heavy_rank, "bytes: rank 1 has"),
    ("every weight element on its ranks", swapped_weights, "rank 0 holds elements"),
    ("every weight element on its ranks", weight_in_other_order, "rank 0 holds elements"),
    ("every weight element on its ranks", weight_nowhere, "rank 2 holds 0 parts of"),
    ("every weight element on its ranks", weight_twice, "rank 2 holds 2 parts of"),
    ("every weight element on its ranks", unknown_weight, "which the model has not"),
    ("every weight element on its ranks", whole_weight, "rank 1 holds [192, 64] of"),
]


@pytest.mark.parametrize(("name", "damage", "text"), BROKEN, ids=[b[1].__name__ for b in BROKEN])
def test_a_broken_graph_fails_its_check(name, damage, text):
    """A check that cannot fail proves nothing. The text names the fault."""
    graph = traced(HELIX, backward=False)
    damage(graph)
    result = next(one for one in run_checks(graph) if one.name == name)
    assert not result.passed
    assert str(result).startswith(f"FAILED  {name}:")
    assert any(text in problem for problem in result.problems), result.problems


def test_a_message_of_another_shape_fails():
    """Pipeline stages must send what the next one expects."""
    graph = traced(BASELINE, backward=False)
    message = next(one for one in graph.collectives if one.kind == "send")
    graph.node[message.members[1]].outputs = (Spec((8, 2, 63), "bf16"),)
    result = next(one for one in run_checks(graph) if "cross-rank" in one.name)
    assert any("is sent, and" in problem for problem in result.problems)


def test_balance_has_a_limit():
    """The figure is the ratio; the limit says where balance ends."""
    nodes = [
        Node("r0.0", "operator", "aten.mm", "m", (0,), flops=100, bytes=10),
        Node("r1.0", "operator", "aten.mm", "m", (1,), flops=120, bytes=10),
    ]
    graph = Graph("small", {"ranks": 2}, nodes=nodes)
    figure, problems = balanced(graph, 1.25)
    assert "FLOPs 1.200 (100 to 120)" in figure
    assert problems == ()
    _, (problem,) = balanced(graph, 1.1)
    assert (
        problem
        == "flops: rank 1 has 120, rank 0 has 100, 1.200 times as many; at most 1.1 is balanced"
    )
