"""Which cache layout is fastest, by a roofline of the machine, and why. Starts without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from helix_megatron.core.caches.base import CacheLayout, DecodeShape
from helix_megatron.core.caches.registry import NAMES, cache_layout
from helix_megatron.errors import HelixError, listed
from helix_megatron.hardware import GPU, SCORE_PASSES, Machine
from helix_megatron.tables import text_table


def decode_seconds(cache: CacheLayout, shape: DecodeShape, machine: Machine = GPU) -> float:
    """Estimated seconds of attention of one layer and one step, on the busiest rank."""
    return (
        cache.read_bytes(shape) / machine.memory_bandwidth
        + cache.bytes(shape) / machine.bandwidth
        + len(cache.collectives(shape)) * machine.latency
        + SCORE_PASSES * cache.score_bytes(shape) / machine.memory_bandwidth
    )


def choose_cache_layout(
    shape: DecodeShape,
    name: str = "auto",
    machine: Machine = GPU,
    names: Collection[str] = NAMES,
) -> CacheLayout:
    """The cache layout called `name`; for `auto` the one that is closest to the fastest at any load.

    How many sequences are under way changes from step to step, and the layout cannot. So `auto` looks at one
    sequence and at `shape.sequences`, and takes the layout whose worse ratio to the fastest is smallest.

    Args:
        names: of the layouts that the model can have.

    Raises:
        HelixError: there is no such layout, or the model cannot have it.
    """
    if name != "auto":
        if name not in names:
            wrong = "does not keep the whole heads of this model" if name in NAMES else "is unknown"
            raise HelixError(f"cache layout {name!r} {wrong}. Valid: {listed(('auto', *names))}.")
        return cache_layout(name)
    return min(
        map(cache_layout, names), key=lambda cache: _worst_ratio(cache, shape, machine, names)
    )


def explain_cache_layout(
    shape: DecodeShape,
    name: str = "auto",
    machine: Machine = GPU,
    names: Collection[str] = NAMES,
) -> str:
    """A table of what every layout costs, and the choice, see `choose_cache_layout`."""
    chosen = choose_cache_layout(shape, name, machine, names)
    layout = shape.layout
    loads = sorted({1, shape.sequences})
    title = (
        f"Cache over head groups of {layout.segments} ranks, {layout.group_kv_heads} key-value heads of "
        f"{layout.head_dim} each; context {shape.context:,}. Attention of one layer and one token of every "
        f"sequence, per rank, estimated for {machine.name}:"
    )
    rows = [
        (
            cache.name,
            f"{round(cache.bytes(shape)):,}",
            f"{round(cache.read_bytes(shape)):,}",
            *(f"{decode_seconds(cache, _at(shape, n), machine) * 1e3:.3f}" for n in loads),
            "<- chosen" if cache is chosen else "",
        )
        for cache in map(cache_layout, names)
    ]
    times = [f"{_sequences(load)}, ms" for load in loads]
    lines = [title, text_table(("cache layout", "bytes sent", "bytes read", *times, ""), rows)]
    if name == "auto":
        worst = _worst_ratio(chosen, shape, machine, names)
        most = "the fastest" if worst < 1.005 else f"at most {worst:.2f}× the fastest"
        lines.append(f"{chosen.name}: {chosen.summary}; {most} at either load.")
    return "\n".join(lines)


def _worst_ratio(
    cache: CacheLayout, shape: DecodeShape, machine: Machine, names: Collection[str]
) -> float:
    ratios = []
    for load in {1, shape.sequences}:
        at = _at(shape, load)
        fastest = min(decode_seconds(cache_layout(name), at, machine) for name in names)
        ratios.append(decode_seconds(cache, at, machine) / fastest)
    return max(ratios)


def _at(shape: DecodeShape, sequences: int) -> DecodeShape:
    return dataclasses.replace(shape, sequences=sequences)


def _sequences(count: int) -> str:
    return f"{count} sequence" + "s" * (count != 1)
