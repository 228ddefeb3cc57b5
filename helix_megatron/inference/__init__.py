"""Generation and serving on more ranks than there are key-value heads, no key-value head stored twice.

Start with `cache_layouts` (who keeps which keys and values, and what crosses), `pages` (where they lie),
`attention` (how a step attends to them), `scheduler` (what a step computes) and `engine` (the loop).
"""
