"""The HTTP side of `helix serve`: OpenAI's completions and chat on top of an engine, and metrics.

Start with `app` (the routes), `schema` (what a client may ask) and `generation` (from the engine's thread to a
response). Nothing here imports torch: an engine is whatever has the methods of `inference.request.Engine`.
"""

from helix_megatron import versions

versions.require("uvicorn")
