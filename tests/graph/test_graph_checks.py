"""Each check of the operator graph passes on what runs, and fails on a graph that is broken on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from graph_runs import (
    BASELINE,
    CONTEXT,
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
from helix_megatron.graph.model import Collective, Edge, Graph, Node, Spec, Weight

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
    [HELIX, SEGMENTS, BASELINE, EXPERTS, DEALT_EXPERTS, LOCAL, PLAIN, CONTEXT],
    ids=[
        "helix",
        "segments",
        "baseline",
        "experts",
        "dealt-experts",
        "segment-local",
        "no-sp",
        "context",
    ],
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

Damage = Callable[[Graph], None]
BROKEN: dict[str, list[tuple[Damage, str]]] = {name: [] for name in NAMES}
FC1, FC2 = (f"decoder.layers.0.mlp.linear_{name}" for name in ("fc1", "fc2"))
QKV = "decoder.layers.0.self_attention.linear_qkv"
ACYCLIC, SHAPES, RANKS, COLLECTIVES, RESIDUALS, DIMENSIONS, BALANCE, WEIGHTS = NAMES


def breaks(check: str, text: str) -> Callable[[Damage], Damage]:
    """The decorated damage must fail that check, with that text."""

    def register(damage: Damage) -> Damage:
        BROKEN[check].append((damage, text))
        return damage

    return register


def changed(check: str, text: str, find: Callable[[Graph], Any], **values: Any) -> None:
    """The damage of giving what `find` finds other values; a function is called with the old value."""

    @breaks(check, text)
    def damage(graph: Graph) -> None:
        found = find(graph)
        for one in found if isinstance(found, list) else [found]:
            for name, value in values.items():
                setattr(one, name, value(getattr(one, name)) if callable(value) else value)

    damage.__name__ = text


def product(rank: int, module: str) -> Callable[[Graph], Node]:
    """The forward product of a module on a rank."""

    def find(graph: Graph) -> Node:
        (found,) = forward(graph, rank, "aten.mm", module)
        return found

    return find


def additions(rank: int, layer: int) -> Callable[[Graph], list[Node]]:
    """The residual additions of a layer on a rank."""
    path = f"decoder.layers.{layer}"
    return lambda graph: [
        node for node in forward(graph, rank, "aten.add.Tensor", path) if node.module == path
    ]


def collective(kind: str = "", ranks: int = 0) -> Callable[[Graph], Collective]:
    """The first of a kind, or over so many ranks; an exchange where neither is given."""

    def wanted(one: Collective) -> bool:
        exchange = one.purpose.startswith("exchange")
        return one.kind == kind or len(one.ranks) == ranks or (exchange and not kind and not ranks)

    return lambda graph: next(filter(wanted, graph.collectives))


def member(place: int, kind: str = "") -> Callable[[Graph], Node]:
    """A rank's part in that collective."""
    return lambda graph: graph.node[collective(kind)(graph).members[place]]


def first_product(graph: Graph) -> Node:
    return next(node for node in graph.nodes if node.op == "aten.mm")


def qkv_weight(rank: int) -> Callable[[Graph], Weight]:
    return lambda graph: next(
        w for w in graph.weights if (w.rank, w.name) == (rank, f"{QKV}.weight")
    )


def twice(value: int) -> int:
    return 2 * value


changed(SHAPES, "makes bf16[32, 63]", product(1, FC1), outputs=(Spec((32, 63), "bf16"),))
changed(SHAPES, "makes f32[32, 64]", product(1, FC1), outputs=(Spec((32, 64), "f32"),))
changed(RANKS, "is on ranks [0, 1]", first_product, ranks=(0, 1))
changed(RANKS, "is on ranks [none]", first_product, ranks=())
changed(RANKS, "occurs twice", lambda graph: graph.nodes[5], id="r0.4")
changed(COLLECTIVES, "it has no group", collective(), group="")
changed(COLLECTIVES, "and it says 0", collective(), sent_bytes=0)
later = {"ranks": lambda ranks: tuple(rank + 1 for rank in ranks)}
changed(COLLECTIVES, "its nodes are on [0, 1]", collective(), **later)
fewer = {"members": lambda members: members[:-1]}
changed(COLLECTIVES, "its nodes are on [0, 1, 2]", collective(ranks=4), **fewer)
changed(COLLECTIVES, "op is all-gather on rank 0", member(0), op="all-gather")
# The collective says another kind than all of its ranks.
changed(COLLECTIVES, "runs all-to-all in", collective(), kind="broadcast")
changed(COLLECTIVES, "purpose is exchange/", member(1), purpose="other")
changed(COLLECTIVES, "phase is forward on rank 0", member(1), phase="gradients")
changed(COLLECTIVES, "micro-batch is 0 on rank 0", member(1), micro_batch=1)
lost = (Spec((3, 2, 64), "bf16"),)
changed(COLLECTIVES, "elements, and its ranks get", member(0, "reduce-scatter"), outputs=lost)
columns = (Spec((32, 47), "bf16"),)
changed(DIMENSIONS, "sum to 191, and the whole is 192", product(3, QKV), outputs=columns)
narrow = {"inputs": lambda inputs: (Spec((32, 63), "bf16"), *inputs[1:])}
changed(DIMENSIONS, "sum to 255, and the whole is 256", product(3, FC2), **narrow)
changed(DIMENSIONS, "4, 4, 4, 3 sum to 15", additions(3, 0), outputs=lost)
# Additions of another name: nothing shows how many tokens there are, nor do three ranks of four.
changed(
    DIMENSIONS,
    "no residual addition shows its",
    lambda graph: [node for node in graph.nodes if node.op == "aten.add.Tensor"],
    op="aten.add.out",
)
changed(DIMENSIONS, "rank 2, layer 1: no addition", additions(2, 1), op="aten.add.out")
changed(DIMENSIONS, "rank 3 multiplies by no", product(3, FC2), op="aten.clone")
changed(BALANCE, "flops: rank 1 has", lambda graph: of_rank(graph, 1), flops=twice)
changed(BALANCE, "bytes: rank 1 has", lambda graph: of_rank(graph, 1), bytes=twice)
reverse = {"runs": lambda runs: tuple(reversed(runs))}
changed(WEIGHTS, "rank 0 holds elements", qkv_weight(0), **reverse)
# A rank holds all of what it should hold a part of.
whole = Spec((192, 64), "bf16")
changed(WEIGHTS, "rank 1 holds [192, 64] of", qkv_weight(1), axis=None, runs=(), spec=whole)


@breaks(ACYCLIC, "are on cycles or behind them")
def cycle(graph: Graph) -> None:
    """A product reads what is made of it."""
    edge = next(edge for edge in graph.edges if graph.node[edge.source].op == "aten.mm")
    graph.edges.append(Edge(edge.target, 0, edge.source, 0))


@breaks(ACYCLIC, "are on cycles or behind them")
def crossed_collectives(graph: Graph) -> None:
    """Two ranks run two collectives in opposite order: they would wait for each other for ever."""
    first, second = [one for one in graph.collectives if len(one.ranks) == 4][:2]
    (a, *rest), (b, *others) = first.members, second.members
    first.members, second.members = (b, *rest), (a, *others)


@breaks(SHAPES, "nothing makes its inputs 0, 1")
def no_source(graph: Graph) -> None:
    reader = product(1, FC1)(graph).id
    graph.edges = [edge for edge in graph.edges if edge.target != reader]


@breaks(SHAPES, "ends at no node")
def dangling_edge(graph: Graph) -> None:
    graph.edges.append(Edge("r0.999999", 0, graph.nodes[-1].id, 0))


@breaks(RANKS, "rank 2 runs nothing")
def idle_rank(graph: Graph) -> None:
    gone = {node.id for node in of_rank(graph, 2)}
    graph.nodes = [node for node in graph.nodes if node.id not in gone]
    graph.edges = [edge for edge in graph.edges if edge.target not in gone]


@breaks(COLLECTIVES, "on rank 1 without a collective")
def shortcut(graph: Graph) -> None:
    """A tensor of rank 0 is read on rank 1, and nothing carried it there."""
    graph.edges.append(Edge(product(0, FC1)(graph).id, 0, product(1, FC2)(graph).id, 0))


@breaks(COLLECTIVES, "and its shapes make")
def wrong_bytes(graph: Graph) -> None:
    """Both say the same number of bytes, and the shapes say another."""
    one = collective("all-gather")(graph)
    for node in (one, *map(graph.node.__getitem__, one.members)):
        node.sent_bytes *= 2


@breaks(COLLECTIVES, "is part of 0 collectives")
def unjoined(graph: Graph) -> None:
    graph.collectives.pop()


@breaks(RESIDUALS, "rank 2, layer 1: 0 additions of mlp's output")
def no_residual(graph: Graph) -> None:
    """The MLP's output replaces what it should be added to."""
    residual = additions(2, 1)(graph)[-1]
    graph.edges = [e for e in graph.edges if (e.target, e.input) != (residual.id, 0)]


@breaks(RESIDUALS, "rank 0, layer 0: 0 additions of self_attention's")
def residual_of_something_else(graph: Graph) -> None:
    """The first residual adds attention's output to itself."""
    residual = next(node for node in additions(0, 0)(graph) if len(node.inputs[1].shape) > 1)
    edges = [edge for edge in graph.edges if edge.target == residual.id]
    graph.edges = [edge for edge in graph.edges if edge not in edges]
    branch = next(e for e in edges if e.input == 1)
    graph.edges += [branch, dataclasses.replace(branch, input=0)]


@breaks(DIMENSIONS, "not checked: nodes or ranks are missing")
def no_ranks(graph: Graph) -> None:
    """A graph that says nothing of its ranks: there is nothing to add up."""
    graph.ranks.clear()


@breaks(WEIGHTS, "rank 0 holds elements")
def swapped_weights(graph: Graph) -> None:
    """Two ranks hold each other's rows: shapes agree, elements do not."""
    one, other = qkv_weight(0)(graph), qkv_weight(1)(graph)
    one.runs, other.runs = other.runs, one.runs


@breaks(WEIGHTS, "rank 2 holds 0 parts of")
def weight_nowhere(graph: Graph) -> None:
    graph.weights.remove(qkv_weight(2)(graph))


@breaks(WEIGHTS, "rank 2 holds 2 parts of")
def weight_twice(graph: Graph) -> None:
    graph.weights.append(qkv_weight(2)(graph))


@breaks(WEIGHTS, "which the model has not")
def unknown_weight(graph: Graph) -> None:
    name = "decoder.layers.7.mlp.linear_fc1.weight"
    graph.weights.append(dataclasses.replace(qkv_weight(2)(graph), name=name))


@pytest.mark.parametrize(
    ("name", "damage", "text"),
    [
        pytest.param(name, damage, text, id=damage.__name__)
        for name, damages in BROKEN.items()
        for damage, text in damages
    ],
)
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
        Node(f"r{rank}.0", "operator", "aten.mm", "m", (rank,), flops=flops, bytes=10)
        for rank, flops in enumerate((100, 120))
    ]
    graph = Graph("small", {"ranks": 2}, nodes=nodes)
    figure, problems = balanced(graph, 1.25)
    assert "FLOPs 1.200 (100 to 120)" in figure
    assert problems == ()
    _, (problem,) = balanced(graph, 1.1)
    ratio = "rank 1 has 120, rank 0 has 100, 1.200 times as many"
    assert problem == f"flops: {ratio}; at most 1.1 is balanced"
