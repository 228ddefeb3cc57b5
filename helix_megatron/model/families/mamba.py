"""Mamba layers in `config.json` and in tensors, and the layers of Bamba and Granite 4.

A layer of these two is Mamba or attention and then an MLP or experts, each with a norm before it and added to
the hidden states. So it is two letters of a hybrid pattern: M or *, and then - or E.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.delta_net import FULL, LINEAR, parts_of
from helix_megatron.model.families.family import Row
from helix_megatron.model.families.pieces import Config, Only, Piece, Unread, check_field, needed
from helix_megatron.model.families.tensors import ATTENTION_LAYER
from helix_megatron.model.sizes import MAMBA_KERNEL

OLDER = {"mamba": LINEAR, "attention": FULL}  # names of kinds of layers
NEWER = {newer: older for older, newer in OLDER.items()}
MAMBA_EPSILON = 1e-5  # of Mamba's inner norm: megatron-core has no other
CONVOLVED = ("Mi", "Mm", "Mm")


def mamba_rows(module: str, norm: str) -> tuple[Row, ...]:
    """Rows of a Mamba layer, by the names of its module and of the norm before it."""
    parts: dict[str, Any] = {"blocks": "1", "when": "mamba", "own": "mixer."}
    return (
        Row("mixer.in_proj.layer_norm_weight", f"{norm}.weight[D]", when="mamba"),
        *parts_of(
            f"{module}.in_proj.weight[Mp,D]",
            "z x B C dt",
            parts=("Mi", *CONVOLVED, "Mh"),
            prefix="in_proj.weight.",
            **parts,
        ),
        *(
            part
            for kind, shape in (("weight", "Mc,1,Mk"), ("bias", "Mc"))
            for part in parts_of(
                f"{module}.conv1d.{kind}[{shape}]",
                "x B C",
                parts=CONVOLVED,
                prefix=f"conv1d.{kind}.",
                **parts,
            )
        ),
        *(
            Row(f"mixer.{name}", f"{module}.{name}[Mh]", when="mamba")
            for name in ("dt_bias", "A_log", "D")
        ),
        Row("mixer.norm.weight", f"{module}.norm.weight[Mi]", when="mamba"),
        Row("mixer.out_proj.weight", f"{module}.out_proj.weight[D,Mi]", when="mamba"),
    )


ATTENTION = tuple(
    replace(row, when=f"{row.when} attention")
    for row in ATTENTION_LAYER
    if row.name.startswith("self_attention.")
)
FINAL_NORMS = (("decoder.final_norm", "pattern"), ("decoder.final_layernorm", "no-pattern"))


def outer_rows(norm: str) -> tuple[Row, ...]:
    """Rows outside of the layers, by the name of the last norm."""
    return (
        Row("embedding.word_embeddings.weight", "embed_tokens.weight[V,D]"),
        *(Row(f"{name}.weight", f"{norm}.weight[D]", when=when) for name, when in FINAL_NORMS),
        Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
    )


class PairedLayers(Piece):
    """Layers of Mamba or attention with a part behind it, and the sizes of Mamba.

    Models without Mamba are GPTs, and have no pattern.
    """

    keys: tuple[str, ...] = (
        *("num_hidden_layers", "mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
        *("mamba_d_state", "mamba_expand"),
    )
    fields: ClassVar = {
        "num_hidden_layers": "num_layers",
        "mamba_n_heads": "mamba_num_heads",
        "mamba_n_groups": "mamba_num_groups",
        "mamba_d_state": "mamba_state_dim",
        "mamba_expand": "num_layers",  # checked as that is: a whole number
    }
    epsilon: float  # of norms when the key is absent

    @abstractmethod
    def is_mamba(self, config: Config) -> list[bool]:
        """Of each layer."""

    @abstractmethod
    def listed(self, is_mamba: list[bool]) -> dict[str, Any]:
        """The inverse, as keys."""

    def behind(self, config: Config) -> str:
        """The letter of what stands behind Mamba or attention."""
        return "-"

    def flags(self, config: Config) -> dict[str, Any]:
        layers = self.is_mamba(config)
        if not any(layers):
            return {"num_layers": len(layers)}
        epsilon = needed(config, "rms_norm_eps", self.epsilon)
        if epsilon != MAMBA_EPSILON:
            raise HelixError(
                f"config.json sets rms_norm_eps = {epsilon}, and the norm inside of Megatron's Mamba "
                f"layers has {MAMBA_EPSILON}. Valid with Mamba layers: {MAMBA_EPSILON}."
            )
        behind = self.behind(config)
        return {
            "num_layers": 2 * len(layers),
            "hybrid_layer_pattern": "".join(("M" if own else "*") + behind for own in layers),
            "mamba_num_groups": needed(config, "mamba_n_groups", 1),
            "mamba_state_dim": needed(config, "mamba_d_state", 256),
            **_heads(config),
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        mixers = (model.hybrid_layer_pattern or "*" * 2 * model.num_layers)[::2]
        written = {"num_hidden_layers": len(mixers)} | self.listed([own == "M" for own in mixers])
        if "mamba" not in model.traits:
            return written | {"mamba_n_heads": 1}  # which divides the dimensions of any model
        return written | {
            "mamba_n_heads": model.mamba_num_heads,
            "mamba_d_head": model.mamba_head_dim,
            "mamba_n_groups": model.mamba_num_groups,
            "mamba_d_state": model.mamba_state_dim,
            "mamba_expand": max(1, model.mamba_inner // model.hidden_size),
        }


def _heads(config: Config) -> dict[str, int]:
    """Mamba's heads, whose dimensions are a multiple of the hidden size together."""
    heads, dims = needed(config, "mamba_n_heads", 128), needed(config, "mamba_d_head", "auto")
    expand, hidden = needed(config, "mamba_expand", 2), needed(config, "hidden_size")
    if dims == "auto":
        dims = max(1, expand * hidden // heads)
    check_field("mamba_d_head", "mamba_head_dim", dims)
    if heads * dims != expand * hidden:
        raise HelixError(
            f"config.json has mamba_n_heads = {heads} of mamba_d_head = {dims}, which are {heads * dims} "
            f"dimensions, and mamba_expand = {expand} times hidden_size = {hidden} are {expand * hidden}. They "
            "must be equal."
        )
    return {"mamba_num_heads": heads, "mamba_head_dim": dims}


# Time steps are not limited, in each of the spellings of that.
NO_LIMIT = ((0.0, math.inf), [0.0, math.inf], [0.0, {"__float__": "Infinity"}])
OTHERS = (
    Only(mamba_d_conv=(MAMBA_KERNEL,), mamba_conv_bias=(True,), mamba_proj_bias=(False,)),
    Only(time_step_limit=NO_LIMIT),
    Unread("mamba_chunk_size", "time_step_min", "time_step_max"),
)
