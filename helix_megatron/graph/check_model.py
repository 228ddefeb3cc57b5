"""Checks of the graph against the model that it is a graph of: residuals, dimensions and weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from helix_megatron.checkpoint.catalog import CanonicalTensor, Cut, catalog
from helix_megatron.checkpoint.partition import Place, RankLayout
from helix_megatron.config import HelixConfig
from helix_megatron.core.layout import contiguous_runs
from helix_megatron.errors import listed
from helix_megatron.graph.model import FORWARD, Graph, Node, Weight
from helix_megatron.units import count

Outcome = tuple[str, tuple[str, ...]]  # figure, problems
ADDITION = "aten.add.Tensor"
NORMS = {"self_attention": "input_layernorm", "mlp": "pre_mlp_layernorm"}  # module → its norm
MATRIX_PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.mm.dtype")


# ------------------------------------------------------------------------------ residuals


def residuals(graph: Graph) -> Outcome:
    """Each layer adds attention's and the MLP's output to what went into their norms, in every forward pass."""
    found, passes = _residual_additions(graph), len(_layers_of_ranks(graph))
    problems = (
        f"rank {rank}, layer {layer}: {len(additions)} additions of {module}'s output to what {NORMS[module]} "
        "reads, instead of 1"
        for (rank, layer, _, module), additions in found.items()
        if len(additions) != 1
    )
    total = sum(map(len, found.values()))
    return f"{total:,} additions, 2 in each of {passes} layers of ranks", tuple(problems)


def _residual_additions(graph: Graph) -> dict[tuple[int, int, int, str], list[Node]]:
    """(rank, layer, micro-batch, module) → the additions of the module's output to the residual stream.

    All that the settings promise are keys; where the graph has no addition, the list is empty.
    """
    made: dict[tuple[int, str, int], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == ADDITION and node.phase == FORWARD:
            made[node.rank, node.module, node.micro_batch].append(node)
    found = {}
    for rank, layer, micro_batch in _layers_of_ranks(graph):
        path = f"decoder.layers.{layer}"
        for module, norm in NORMS.items():
            found[rank, layer, micro_batch, module] = [
                node
                for node in made[rank, path, micro_batch]
                if _is_residual(graph, node, f"{path}.{norm}", f"{path}.{module}")
            ]
    return found


def _layers_of_ranks(graph: Graph) -> list[tuple[int, int, int]]:
    """(rank, layer, micro-batch) that the settings say a rank runs."""
    settings = graph.settings
    layers = settings["model"]["num_layers"] // settings["pipeline"]
    return [
        (entry["rank"], entry["pipeline"] * layers + layer, micro_batch)
        for entry in graph.ranks
        for layer in range(layers)
        for micro_batch in range(settings["micro_batches"])
    ]


def _is_residual(graph: Graph, addition: Node, norm: str, module: str) -> bool:
    """Whether one operand is also read by the norm, and the other comes out of the module."""
    edges = graph.producers.get(addition.id, [])
    if len(edges) != 2:
        return False
    for skip, branch in (edges, edges[::-1]):
        readers = (e for e in graph.consumers[skip.source] if e.output == skip.output)
        skipped = any(graph.node[edge.target].module == norm for edge in readers)
        if skipped and _comes_from(graph, branch.source, module, addition.module):
            return True
    return False


def _comes_from(graph: Graph, name: str, module: str, through: str) -> bool:
    """Whether a tensor was made in a module, or from one by what the layer itself runs (bias, dropout)."""
    pending, seen = [name], set()
    while pending:
        node = graph.node[pending.pop()]
        if node.module == module or node.module.startswith(module + "."):
            return True
        if node.id not in seen and node.module == through and node.op != "aten.native_layer_norm":
            seen.add(node.id)
            pending += [edge.source for edge in graph.producers.get(node.id, [])]
    return False


# ------------------------------------------------------------------------------ dimensions


def dimensions(graph: Graph) -> Outcome:
    """What the ranks of a tensor parallel group compute in parts adds up to the model's sizes.

    For every matrix that is cut: the local columns that the product makes (or, where columns are cut, the
    local columns that it reads) sum to the rows (columns) of the whole matrix. And the tokens of the residual
    stream sum to the sequence.
    """
    problems: list[str] = []
    sums: dict[tuple[str, Any], dict[int, int]] = defaultdict(dict)
    wholes: dict[str, int] = {}
    products = _products(graph)
    for weight in graph.weights:
        if weight.axis is None or len(weight.shape) != 2 or "embedding" in weight.local_name:
            continue
        product = products.get(weight.node)
        if product is None:
            problems.append(f"rank {weight.rank} multiplies by no {weight.name}")
            continue
        # The columns that it makes, or those of its left matrix.
        local = (product.outputs[0] if weight.axis == 0 else product.inputs[-2]).shape[-1]
        entry = graph.place[weight.rank]
        inside = "expert_tensor" if ".experts." in weight.name else "tensor"
        copy = _copy_of(graph, weight, entry)
        sums[weight.name, copy].setdefault(entry[inside], local)
        wholes[weight.name] = weight.shape[weight.axis]
    figures: Counter[str] = Counter()
    for (name, _), parts in sums.items():
        total = sum(parts.values())
        if total != wholes[name]:
            sums_to = f"{listed(parts.values())} sum to {total}"
            problems.append(f"{name}: {sums_to}, and the whole is {wholes[name]}")
        kind = name.removesuffix(".weight").rpartition(".")[2]
        sizes = "/".join(map(str, sorted(set(parts.values()))))
        figures[f"{kind} {len(parts)} × {sizes} = {wholes[name]}"] += 1
    figure, unequal = _sequence(graph)
    return ", ".join([*figures, figure]), (*problems, *unequal)


def _products(graph: Graph) -> dict[str, Node]:
    """Parameter's node → the forward product that multiplies by it, through views."""
    found: dict[str, Node] = {}
    for weight in graph.weights:
        pending = [weight.node] if weight.node else []
        while pending:
            for edge in graph.consumers.get(pending.pop(), []):
                node = graph.node[edge.target]
                if node.phase != FORWARD:
                    continue
                if node.op in MATRIX_PRODUCTS:
                    found.setdefault(weight.node, node)
                elif node.view:
                    pending.append(node.id)
    return found


def _copy_of(graph: Graph, weight: Weight, entry: dict[str, Any]) -> tuple[int, ...]:
    """Ranks that hold the parts of the same copy of a weight share this."""
    if ".experts." in weight.name:
        return (weight.rank // (graph.settings["expert_tensor"] * graph.settings["expert"]),)
    return entry["data"], entry["context"], entry["pipeline"]


def _sequence(graph: Graph) -> Outcome:
    """The residual stream's tokens, over the ranks that share them, are the sequence.

    Tokens are counted in the shapes of the residual additions: after attention and after the MLP of each layer.
    """
    whole, shared = graph.settings["seq_length"], graph.settings["sequence_parallel"]
    problems = []
    parts: dict[Any, list[int]] = defaultdict(list)
    for (rank, layer, micro_batch, module), additions in _residual_additions(graph).items():
        entry = graph.place[rank]
        copy = (entry["data"], None if shared else entry["tensor"])
        if not additions:
            where = f"rank {rank}, layer {layer}"
            problems.append(f"{where}: no addition shows how many tokens {module} leaves")
        for node in additions[:1]:
            parts[layer, module, micro_batch, copy].append(node.outputs[0].shape[0])
    if not parts:
        problems.append("sequence: no residual addition shows its tokens")
    figures: Counter[str] = Counter()
    for (layer, module, *_), tokens in parts.items():
        total = sum(tokens)
        if total != whole:
            sums_to = f"tokens after layer {layer}'s {module}: {listed(tokens)} sum to {total}"
            problems.append(f"{sums_to}, and the sequence has {whole}")
        sizes = "/".join(map(str, sorted(set(tokens))))
        figures[f"sequence {len(tokens)} × {sizes} = {total}"] += 1
    return ", ".join(figures), tuple(problems)


# --------------------------------------------------------------------------------- weights


def weights(graph: Graph) -> Outcome:
    """Every element of every canonical tensor is on exactly the ranks that the layout puts it on.

    What the model holds is read from its sharded state dictionary; what it should hold comes from `HeadLayout`
    for attention and from `checkpoint.partition` for the rest.
    """
    layout = rank_layout(graph.settings)
    tensors = catalog(graph.settings["model"])
    held: dict[tuple[int, str], list[Weight]] = defaultdict(list)
    for weight in graph.weights:
        held[weight.rank, weight.name].append(weight)
    problems: list[str] = []
    elements = 0
    copies: Counter[int] = Counter()
    for tensor in tensors:
        places = 0
        for entry in graph.ranks:
            names = ("pipeline", "tensor", "expert", "expert_tensor")
            place = Place(*(entry[name] for name in names))
            parts = held.pop((entry["rank"], tensor.name), [])
            expected = layout.holds(tensor, place)
            places += expected
            if len(parts) != expected:
                held_here = f"rank {entry['rank']} holds {len(parts)} parts of {tensor.name}"
                problems.append(f"{held_here} instead of {int(expected)}")
            for weight in parts if expected else []:
                problems += _problems_of(layout, tensor, place, weight)
                elements += weight.spec.numel
        cut = _ranks_of_a_cut(graph, tensor)
        copies[places // cut] += 1
        if places % cut or not places:
            on = f"{tensor.name} has parts on {places} ranks"
            problems.append(f"{on}, which is no multiple of {cut}")
    problems += [f"rank {rank} holds {name}, which the model has not" for rank, name in held]
    whole = sum(tensor.numel for tensor in tensors)
    parts_of = ", ".join(
        f"{number} tensor{'s' * (number > 1)} on {k} rank{'s' * (k > 1)} per element"
        for k, number in sorted(copies.items())
    )
    sizes = f"{count(whole)} elements of {len(tensors)} tensors, {count(elements)} held"
    return f"{sizes}: {parts_of}", tuple(problems)


def rank_layout(settings: dict[str, Any]) -> RankLayout:
    """How the run cuts its weights."""
    helix = HelixConfig()
    if settings["attention"] == "exact":
        helix = HelixConfig(settings["segments"], query_layout=settings["query_layout"])
    sizes = {name: settings[name] for name in ("tensor", "pipeline", "expert", "expert_tensor")}
    return RankLayout(settings["model"], **sizes, helix=helix)


def _ranks_of_a_cut(graph: Graph, tensor: CanonicalTensor) -> int:
    """Ranks that one copy of a tensor is dealt to."""
    if tensor.cut is Cut.REPLICATED:
        return 1
    return graph.settings["tensor" if tensor.expert is None else "expert_tensor"]


def _problems_of(
    layout: RankLayout, tensor: CanonicalTensor, place: Place, weight: Weight
) -> Iterator[str]:
    part = layout.part(tensor, place)
    if weight.shape != tensor.shape:
        yield f"{tensor.name} is {list(weight.shape)} on rank {weight.rank} instead of {list(tensor.shape)}"
    if weight.spec.shape != part.shape(tensor.shape):
        yield (
            f"rank {weight.rank} holds {list(weight.spec.shape)} of {tensor.name} instead of "
            f"{list(part.shape(tensor.shape))}"
        )
    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()
    if part.index is not None and len(part.index) != tensor.shape[part.axis or 0]:
        axis, runs = part.axis, tuple(contiguous_runs(part.index))
    if (weight.axis, _joined(weight.runs)) != (axis, runs):
        yield (
            f"rank {weight.rank} holds elements {_text(weight.runs)} along axis {weight.axis} of {tensor.name} "
            f"instead of {_text(runs)} along axis {axis}"
        )


def _joined(runs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Runs that touch, as one."""
    if not runs:
        return ()
    return tuple(contiguous_runs(np.concatenate([np.arange(a, a + n) for a, n in runs])))


def _text(runs: tuple[tuple[int, int], ...]) -> str:
    shown = listed(f"{start}-{start + length - 1}" for start, length in runs[:4])
    return shown + (" …" if len(runs) > 4 else "")
