"""Generation and serving on more ranks than there are key-value heads, no key-value head stored twice.

Start with `helix_megatron.core.caches` (who keeps which keys and values, and what crosses; `pages`: where they
lie), then `scheduler` (what a step computes) and `engine` (the loop).
"""
