"""Bamba: Mamba layers among those of attention, which turns half of each head, all with a gated MLP behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import LLAMA_LIKE, NO_BIASES, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.mamba import (
    ATTENTION,
    OTHERS,
    PairedLayers,
    mamba_rows,
    outer_rows,
)
from helix_megatron.model.families.pieces import Config, Heads, Only, Tied, Unread, needed
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import GATED_MLP


class Layers(PairedLayers):
    """Those of attention are listed by number, in `attn_layer_indices`; without a list all are Mamba."""

    keys = (*PairedLayers.keys, "attn_layer_indices")
    epsilon = 1e-5

    def is_mamba(self, config: Config) -> list[bool]:
        number, full = needed(config, "num_hidden_layers"), config.get("attn_layer_indices") or []
        if not isinstance(full, list) or not all(type(layer) is int for layer in full):
            raise HelixError(
                f"config.json sets attn_layer_indices = {full!r:.80}. It must be a list of whole numbers."
            )
        return [layer not in full for layer in range(number)]

    def listed(self, is_mamba: list[bool]) -> dict[str, Any]:
        return {"attn_layer_indices": [layer for layer, own in enumerate(is_mamba) if not own]}


class HalfRope(Rope):
    """Of half of each head, or of the share in `rope_parameters`; transformers reads no key beside those."""

    def flags(self, config: Config) -> dict[str, Any]:
        return super().flags({**config, "partial_rotary_factor": None})

    def config(self, model: ModelConfig) -> dict[str, Any]:
        written = super().config(model)
        if written["rope_scaling"]:  # the one older key in which transformers reads the share
            written["rope_scaling"]["partial_rotary_factor"] = model.rotary_percent
        return written


FAMILY = Family(
    name="bamba",
    architecture="BambaForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Layers(),
        NO_BIASES,
        Heads(kv_heads=8),
        HalfRope(partial=0.5),
        keys(max_position_embeddings=262144, norm_epsilon=1e-5),
        Tied(False),
        *OTHERS,
        Only(attention_bias=(False,), mlp_bias=(False,)),
        Unread("attn_rotary_emb", "num_logits_to_keep", "z_loss_coefficient"),
    ),
    rows=(
        *mamba_rows("mamba", "input_layernorm"),
        *ATTENTION,
        Row("mlp.linear_fc1.layer_norm_weight", "pre_ff_layernorm.weight[D]", when="dense"),
        *(replace(row, sources=row.sources.replace("mlp.", "feed_forward.")) for row in GATED_MLP),
    ),
    outer=outer_rows("final_layernorm"),
    letters=2,
    aliases=frozenset(("layer_types",)),
    runs_in_engine=False,
)
