"""Granite 4: layers of Mamba or attention, each with experts beside a shared one, or an MLP, behind it."""

from __future__ import annotations

from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import NO_BIASES, RMS_NORM, SILU, keys
from helix_megatron.model.families.delta_net import FULL, LINEAR
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.granite import MULTIPLIERS
from helix_megatron.model.families.granitemoe import EXPERT_ROWS, EXPERTS
from helix_megatron.model.families.mamba import (
    ATTENTION,
    NEWER,
    OLDER,
    OTHERS,
    PairedLayers,
    mamba_rows,
    outer_rows,
)
from helix_megatron.model.families.pieces import (
    Config,
    Heads,
    Only,
    Piece,
    Tied,
    Unread,
    Vocabulary,
    check_field,
    needed,
)
from helix_megatron.model.families.positions import Rope


def num_experts(config: Config) -> int:
    """Of each layer; 0 where it has an MLP."""
    number: int = needed(config, "num_local_experts", EXPERTS.default_number)
    return number


class Layers(PairedLayers):
    """Listed by kind, in `layer_types`; without a list all are Mamba."""

    keys = (*PairedLayers.keys, "layer_types")
    epsilon = 1e-6

    def is_mamba(self, config: Config) -> list[bool]:
        number, types = needed(config, "num_hidden_layers"), config.get("layer_types")
        if types is None:
            return [True] * number
        known = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
        newer = [OLDER.get(kind, kind) for kind in types] if known else []
        if len(newer) != number or set(newer) - {FULL, LINEAR}:
            raise HelixError(
                f"config.json sets layer_types = {types!r:.120} for {number} layers. It must be a list with "
                f"one of {listed((*OLDER, *NEWER))} for each."
            )
        return [kind == LINEAR for kind in newer]

    def listed(self, is_mamba: list[bool]) -> dict[str, Any]:
        return {"layer_types": [NEWER[LINEAR if own else FULL] for own in is_mamba]}

    def behind(self, config: Config) -> str:
        return "E" if num_experts(config) else "-"


class FeedForward(Piece):
    """Experts beside one that all tokens share; of models without experts that is the MLP."""

    keys = (*EXPERTS.keys, "shared_intermediate_size")
    fields: ClassVar = {
        "shared_intermediate_size": "ffn_hidden_size",
        **dict.fromkeys(EXPERTS.keys, "window_size"),  # a whole number, 0 without experts
    }

    def flags(self, config: Config) -> dict[str, Any]:
        shared = needed(config, "shared_intermediate_size", 1024)
        if not num_experts(config):
            return {"ffn_hidden_size": shared}
        for key, field in EXPERTS.fields.items():
            check_field(key, field, config.get(key))
        own = {"moe_shared_expert_intermediate_size": shared}
        return EXPERTS.flags({**config, "num_local_experts": num_experts(config)}) | own

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if model.num_experts is None:
            sizes = ("shared_intermediate_size", "intermediate_size")
            return {"num_local_experts": 0, **dict.fromkeys(sizes, model.ffn_hidden_size)}
        shared = model.moe_shared_expert_intermediate_size
        return EXPERTS.config(model) | {"shared_intermediate_size": shared}


class Positions(Rope):
    """Rotary embedding where `position_embedding_type` asks for it, else none."""

    keys = ("position_embedding_type",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", (*Rope.keys, "position_embedding_type"))

    def flags(self, config: Config) -> dict[str, Any]:
        if config.get("position_embedding_type") == "rope":
            return super().flags(config)
        return {"position_embedding_type": "none"}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if model.position_embedding_type == "none":
            return {"position_embedding_type": "nope"}
        return super().config(model) | {"position_embedding_type": "rope"}


NORM = "post_attention_layernorm.weight[D]"

FAMILY = Family(
    name="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        Layers(),
        keys(hidden_size=..., attention_dropout=0.0, init_method_std=0.02),
        keys(max_position_embeddings=2048, norm_epsilon=1e-6),
        Vocabulary(),
        RMS_NORM,
        SILU,
        NO_BIASES,
        Heads(),
        Positions(),
        MULTIPLIERS,
        Tied(False),
        FeedForward(),
        *OTHERS,
        Only(attention_bias=(False,)),
        Unread("init_method", "normalization_function"),
    ),
    rows=(
        *mamba_rows("mamba", "input_layernorm"),
        *ATTENTION,
        Row("mlp.linear_fc1.layer_norm_weight", NORM, when="dense"),
        Row("mlp.linear_fc1.weight", "shared_mlp.input_linear.weight[2F,D]", when="dense"),
        Row("mlp.linear_fc2.weight", "shared_mlp.output_linear.weight[D,F]", when="dense"),
        Row("pre_mlp_layernorm.weight", NORM, when="experts pattern"),
        Row("mlp.linear_fc1.layer_norm_weight", NORM, when="experts no-pattern"),
        *EXPERT_ROWS,
        *(
            Row(
                f"mlp.shared_experts.{fc}.weight",
                f"shared_mlp.{name}.weight[{shape}]",
                when="experts",
            )
            for fc, name, shape in (
                ("linear_fc1", "input_linear", "2S,D"),
                ("linear_fc2", "output_linear", "D,S"),
            )
        ),
    ),
    outer=outer_rows("norm"),
    letters=2,
    aliases=frozenset(("layers_block_type",)),
    runs_in_engine=False,
)
