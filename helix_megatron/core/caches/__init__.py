"""How the ranks of a head group share keys and values: each layout's attention and costs, and their choice.

`choose_cache_layout` takes the one that is nearest to the fastest at any load; `explain_cache_layout` says why.
"""

from __future__ import annotations

from helix_megatron.core.caches.base import CacheLayout, DecodeShape
from helix_megatron.core.caches.choice import choose_cache_layout, explain_cache_layout
from helix_megatron.core.caches.registry import (
    CACHE_LAYOUTS,
    NAMES,
    SEGMENTS,
    WHOLE_HEADS,
    cache_layout,
)

__all__ = [
    "CACHE_LAYOUTS",
    "NAMES",
    "SEGMENTS",
    "WHOLE_HEADS",
    "CacheLayout",
    "DecodeShape",
    "cache_layout",
    "choose_cache_layout",
    "explain_cache_layout",
]
