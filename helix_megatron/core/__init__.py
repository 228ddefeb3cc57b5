"""The mathematics: who holds what, how ranks exchange it, what it costs. Nothing here knows a host.

Start with `layout`. `exchanges` and `caches` are the mechanisms; `attention` runs an exchange.
"""
