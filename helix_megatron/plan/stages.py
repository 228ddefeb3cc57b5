"""How layers are dealt to pipeline stages: evenly, or with other numbers on the first and on the last stage.

These are megatron-core's rules (transformer_block.get_num_layers_to_build, 0.16.1). Its flags for stages that
differ: `--account-for-embedding-in-pipeline-split` and `--account-for-loss-in-pipeline-split` take one layer
from the end that they name; `--decoder-first-pipeline-num-layers` and `--decoder-last-pipeline-num-layers` set
the layers of an end.
"""

from __future__ import annotations

import functools

from helix_megatron.errors import HelixError


@functools.lru_cache(maxsize=16384)
def stage_layers(layers: int, stages: int, first: int = 0, last: int = 0) -> tuple[int, ...]:
    """Layers of each stage.

    Args:
        first, last: layers of those stages; 0 where they have as many as the others.

    Raises:
        HelixError: the layers that are left cannot be dealt evenly to the other stages.
    """
    others = stages - bool(first) - bool(last)
    rest = layers - first - last
    if others < 0 or rest < 0 or (rest % others or not rest if others else rest):
        ends = (
            f" with {first or 'as many as others'} on the first and {last or 'as many'} on the last"
        )
        raise HelixError(
            f"{layers} layers cannot be dealt to {stages} pipeline stages{ends if first or last else ''}. "
            "The stages between must have equally many, and each at least one."
        )
    each = rest // others if others else 0
    return (first or each, *[each] * (stages - 2), last or each)[:stages]


@functools.lru_cache(maxsize=4096)
def dealings(layers: int, stages: int) -> tuple[tuple[int, int], ...]:
    """(first, last) of the ways to deal the layers that a search tries; nothing where there is none.

    Even where that goes. Else the ends have fewer layers than the others, the last one the fewest, since it
    computes the loss as well.
    """
    if layers % stages == 0:
        return ((0, 0),)
    each = -(-layers // stages)
    missing = each * stages - layers
    if missing == 1:
        return ((0, each - 1),) if each > 1 else ()
    first, last = each - missing // 2, each - (missing - missing // 2)
    return ((first, last),) if last > 0 and stages > 2 else ()


def is_accounted(layers: int, stages: int, first: int, last: int) -> bool:
    """Whether the ends have fewer layers because embedding and loss count as a layer each."""
    if not (first or last) or stages == bool(first) + bool(last):
        return False
    dealt = stage_layers(layers, stages, first, last)
    each = max(dealt) if stages == 2 else dealt[1]
    return all(end in (0, each - 1) for end in (first, last))


@functools.lru_cache(maxsize=16384)
def chunk_layers(
    layers: int, stages: int, chunks: int, first: int = 0, last: int = 0
) -> tuple[tuple[int, ...], ...] | None:
    """Layers of [stage][chunk] of the interleaved schedule; None where the stages cannot be cut so."""
    dealt = list(stage_layers(layers, stages, first, last))
    accounted = is_accounted(layers, stages, first, last)
    if accounted:
        dealt[0] += bool(first)
        dealt[-1] += bool(last)
    if any(own % chunks for own in dealt):
        return None
    cut = [[own // chunks] * chunks for own in dealt]
    if accounted:
        cut[0][0] -= bool(first)
        cut[-1][-1] -= bool(last)
    return tuple(map(tuple, cut)) if all(map(all, cut)) else None
