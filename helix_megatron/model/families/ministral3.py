"""Ministral 3: Mistral with yarn, and queries that grow with their position.

These grow from position `original_max_position_embeddings` of `rope_parameters` on, by `llama_4_scaling_beta`.
Megatron has no such thing, so the model is converted for shorter sequences: `max_position_embeddings` says how
short.
"""

from __future__ import annotations

import warnings
from typing import Any

from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import Config, Heads, Tied, needed
from helix_megatron.model.families.positions import Rope, Window, older_spelling
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
LONGEST = 262144


class GrowingRope(Rope):
    """Rotary embedding, with the growth of queries among its keys."""

    def flags(self, config: Config) -> dict[str, Any]:
        rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or self.default)
        growth, original = (
            rope.pop("llama_4_scaling_beta", None),
            rope.get("original_max_position_embeddings"),
        )
        rope.pop("max_position_embeddings", None)
        flags = super().flags({**config, "rope_scaling": None, "rope_parameters": rope})
        longest = needed(config, "max_position_embeddings", LONGEST)
        if growth and original is not None and original < longest:
            warnings.warn(
                f"llama_4_scaling_beta = {growth} changes what this model computes for sequences of more than "
                f"{original} tokens. Megatron's GPT does not have it, so that is the longest sequence here "
                f"(max_position_embeddings in config.json: {longest}).",
                stacklevel=4,
            )
            flags["max_position_embeddings"] = original
        return flags

    def config(self, model: ModelConfig) -> dict[str, Any]:
        written = super().config(model)
        rope = {"original_max_position_embeddings": model.max_position_embeddings}
        rope |= written["rope_parameters"] | {"llama_4_scaling_beta": 0.0}
        return written | {"rope_parameters": rope, **older_spelling(rope)}


FAMILY = Family(
    name="ministral3",
    architecture="Ministral3ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=8, head_dim=128),
        keys(max_position_embeddings=LONGEST, norm_epsilon=1e-5),
        GrowingRope(default=YARN),
        Window(),
        Tied(False),
        NO_BIASES,
    ),
    rows=LLAMA_LAYER,
    outer=LLAMA_OUTER,
)
