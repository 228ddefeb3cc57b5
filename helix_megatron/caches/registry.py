"""All cache layouts, by name."""

from __future__ import annotations

from helix_megatron.caches.base import CacheLayout
from helix_megatron.caches.batch import BatchCache
from helix_megatron.caches.segment import SegmentCache
from helix_megatron.caches.sequence import SequenceCache

CACHE_LAYOUTS: tuple[CacheLayout, ...] = (BatchCache(), SequenceCache(), SegmentCache())
NAMES = tuple(layout.name for layout in CACHE_LAYOUTS)


def cache_layout(name: str) -> CacheLayout:
    """The layout of that name."""
    return next(layout for layout in CACHE_LAYOUTS if layout.name == name)
