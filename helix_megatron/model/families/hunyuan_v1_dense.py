"""Hunyuan, dense: norms of queries and keys behind rotary embedding, whose base `alpha` stretches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family
from helix_megatron.model.families.pieces import (
    Always,
    Config,
    Heads,
    Only,
    Tied,
    Unread,
    check_field,
    needed,
)
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import LLAMA_LAYER, LLAMA_OUTER

LAYER = tuple(
    dataclasses.replace(
        row,
        sources=row.sources.replace("q_norm", "query_layernorm").replace("k_norm", "key_layernorm"),
    )
    for row in LLAMA_LAYER
)


class RopeWithAlpha(Rope):
    """`rope_type` dynamic with `alpha`, by which only the base grows, whatever the length."""

    def flags(self, config: Config) -> dict[str, Any]:
        rope = config.get("rope_scaling") or config.get("rope_parameters")
        if isinstance(rope, Mapping) and rope.get("alpha"):
            check_field("alpha", "rope_scaling_factor", rope["alpha"])
            if rope.get("rope_type", rope.get("type")) == "dynamic":
                dims = Heads().flags(config)["kv_channels"] or (
                    needed(config, "hidden_size") // needed(config, "num_attention_heads")
                )
                if dims <= 2:
                    raise HelixError(
                        f"config.json has heads of {dims} dimensions, whose rotary base alpha cannot stretch. "
                        "They have at least 4."
                    )
                base = rope.get("rope_theta") or needed(config, "rope_theta", self.theta)
                check_field("rope_theta", "rotary_base", base)
                stretched = base * rope["alpha"] ** (dims / (dims - 2))
                plain = {"rope_type": "default", "rope_theta": stretched}
                config = {**config, "rope_scaling": None, "rope_parameters": plain}
        return super().flags(config)


FAMILY = Family(
    name="hunyuan_v1_dense",
    architecture="HunYuanDenseV1ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(),
        RopeWithAlpha(),
        keys(max_position_embeddings=2048, norm_epsilon=1e-5),
        Tied(False),
        NO_BIASES,
        Only(attention_bias=(False,)),
        Unread("eod_token_id"),
        Always(qk_layernorm=True, qk_norm_behind_rotary=True),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
    runs_in_engine=False,
)
