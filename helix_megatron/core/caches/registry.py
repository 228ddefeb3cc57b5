"""All cache layouts, by name."""

from __future__ import annotations

from helix_megatron.core.caches.base import CacheLayout
from helix_megatron.core.caches.batch import BatchCache
from helix_megatron.core.caches.segment import SegmentCache
from helix_megatron.core.caches.sequence import SequenceCache

CACHE_LAYOUTS: tuple[CacheLayout, ...] = (BatchCache(), SequenceCache(), SegmentCache())
NAMES = tuple(layout.name for layout in CACHE_LAYOUTS)


# Where every rank keeps its segments of everything, as stock Megatron does.
SEGMENTS = next(layout.name for layout in CACHE_LAYOUTS if layout.placement == "all")
# Where a rank keeps whole heads, as one that shares its heads with nobody does anyway.
WHOLE_HEADS = next(layout.name for layout in CACHE_LAYOUTS if layout.placement == "one")


def cache_layout(name: str) -> CacheLayout:
    """The layout of that name."""
    return next(layout for layout in CACHE_LAYOUTS if layout.name == name)
