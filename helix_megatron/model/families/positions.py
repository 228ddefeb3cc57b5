"""Rotary embedding and sliding windows in `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.pieces import Config, Piece, check_field, needed

WINDOW_FIELDS = {
    "sliding_window": "window_size",
    "use_sliding_window": "use_rope_scaling",  # true or false
    "max_window_layers": "window_size",  # a whole number, or none
}


@dataclass(frozen=True)
class Rope(Piece):
    """Rotary embedding: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    All three are written: transformers 4 does not know the first, and would take base 10000 without scaling.
    """

    theta: float = 10000.0
    keys: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling")

    def flags(self, config: Config) -> dict[str, Any]:
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise HelixError(f"config.json sets {key} = {rope!r:.80}. It must be an object.")
        rope = dict(rope)
        theta = rope.pop("rope_theta", None)
        if theta is None:
            theta = needed(config, "rope_theta", self.theta)
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if type(theta) not in (int, float) or not math.isfinite(theta):
            check_field("rope_theta", "rotary_base", theta)
        if theta != int(theta):
            raise HelixError(
                f"config.json sets rope_theta = {theta}, and Megatron's rotary_base is a whole number."
            )
        check_field("rope_theta", "rotary_base", int(theta))
        if "factor" in rope:
            check_field("factor", "rope_scaling_factor", rope["factor"])
        flags = {
            "position_embedding_type": "rope",
            "rotary_base": int(theta),
            "use_rope_scaling": kind == "llama3",
            "rotary_seq_len_interpolation_factor": None,
        }
        if kind == "llama3":
            flags["rope_scaling_factor"] = float(needed(rope, "factor"))
            # Megatron has these three as constants.
            expected = {
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        elif kind == "linear":
            flags["rotary_seq_len_interpolation_factor"] = float(needed(rope, "factor"))
            expected = {}
        elif kind == "default":
            expected = {}
        else:
            raise HelixError(
                f"config.json asks for rotary embedding of type {kind!r} (rope_parameters or "
                "rope_scaling), which Megatron's GPT does not have. Valid: default, linear, llama3."
            )
        self._check(rope, kind, expected)
        return flags

    def _check(self, rope: dict[str, Any], kind: str, expected: dict[str, float]) -> None:
        for key, value in expected.items():
            given = rope.pop(key, value)
            if given != value:
                raise HelixError(
                    f"config.json sets {key} = {given} of llama3 rotary embedding. Megatron's GPT has {value} "
                    "only."
                )
        share = rope.pop("partial_rotary_factor", 1.0)
        if share != 1.0:
            raise HelixError(
                f"config.json sets partial_rotary_factor = {share}, which models of this family do not have."
            )
        for key in ("factor", "original_max_position_embeddings"):
            rope.pop(key, None)  # read already, or of a type that does not read it
        if rope:
            raise HelixError(
                f"config.json sets {listed(rope)} for rotary embedding of type {kind}, which Megatron's GPT "
                "does not have. Delete them if they change nothing."
            )

    def config(self, model: ModelConfig) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": float(model.rotary_base), "rope_type": "default"}
        if model.use_rope_scaling:
            rope |= {
                "rope_type": "llama3",
                "factor": model.rope_scaling_factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        elif model.rotary_seq_len_interpolation_factor is not None:
            rope |= {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
        return {"rope_parameters": rope, **older_spelling(rope)}


def older_spelling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of config.json as transformers 4 reads it."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if plain else scaling}


@dataclass(frozen=True)
class Window(Piece):
    """A sliding window in all layers.

    `sliding_window` counts the query's own position, Megatron's window_size does not. With `switch` the
    window counts only if `use_sliding_window` is set. Files of Qwen3-MoE have `max_window_layers`, which its
    model does not read.
    """

    default: int | None = None
    switch: bool = False
    keys: tuple[str, ...] = ("sliding_window", "use_sliding_window", "max_window_layers")
    fields: ClassVar = WINDOW_FIELDS

    def flags(self, config: Config) -> dict[str, Any]:
        window = config.get("sliding_window", self.default)
        used = not self.switch or config.get("use_sliding_window", False)
        return {
            "window_size": window - 1 if window and used else None,
            "window_attn_skip_freq": None,
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        window = model.window_size
        written = {"sliding_window": None if window is None else window + 1}
        return written | ({"use_sliding_window": window is not None} if self.switch else {})


@dataclass(frozen=True)
class LayerWindows(Piece):
    """A sliding window in some layers, listed in `layer_types`, or, without that list, in layers from
    `max_window_layers` on (`alternating`: in every second layer before it)."""

    alternating: bool = False
    keys: tuple[str, ...] = (
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
    )
    fields: ClassVar = WINDOW_FIELDS

    def flags(self, config: Config) -> dict[str, Any]:
        layers = needed(config, "num_hidden_layers")
        used = config.get("use_sliding_window", False)
        window, bound = config.get("sliding_window", 4096), needed(config, "max_window_layers", 28)
        types = config.get("layer_types")
        if types is None:
            sliding = [used and self._windowed(layer, bound) for layer in range(layers)]
        elif not isinstance(types, list) or not all(isinstance(one, str) for one in types):
            raise HelixError(
                f"config.json sets layer_types = {types!r:.80}. It must be a list of texts."
            )
        else:
            sliding = [kind == "sliding_attention" for kind in types]
            unknown = set(types) - {"sliding_attention", "full_attention"}
            if unknown or len(types) != layers:
                raise HelixError(
                    f"config.json has {len(types)} layer_types ({listed(sorted(set(types)))}) for {layers} "
                    "layers. Valid: one of full_attention, sliding_attention for each."
                )
        if not any(sliding):
            return {"window_size": None, "window_attn_skip_freq": None}
        if not used or not window:
            raise HelixError(
                "config.json has sliding_attention among its layer_types, but use_sliding_window is not "
                "set or sliding_window is missing. Correct either."
            )
        pattern = None if all(sliding) else [int(one) for one in sliding]
        return {"window_size": window - 1, "window_attn_skip_freq": pattern}

    def _windowed(self, layer: int, bound: int) -> bool:
        return layer < bound and layer % 2 == 0 if self.alternating else layer >= bound

    def config(self, model: ModelConfig) -> dict[str, Any]:
        window = model.window_size
        names = {True: "sliding_attention", False: "full_attention"}
        return {
            "use_sliding_window": window is not None,
            "sliding_window": None if window is None else window + 1,
            "layer_types": [names[one] for one in model.windowed_layers],
        }
