"""Rotary embedding and sliding windows in `config.json`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.pieces import Config, Piece, check_field, needed
from helix_megatron.model.patterns import is_pattern

WINDOW_FIELDS = {
    "sliding_window": "window_size",
    "use_sliding_window": "use_rope_scaling",  # true or false
    "max_window_layers": "window_size",  # a whole number, or none
}


@dataclass(frozen=True)
class Rope(Piece):
    """Rotary embedding: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    All three are written: transformers 4 does not know the first, and would take base 10000 without scaling.

    Args:
        theta: when it is not given.
        partial: the share of a head's dimensions that turns when it is not given; None for families all of
            whose dimensions turn.
        interleaved: neighbouring dimensions are a pair.
        default: `rope_parameters` of a config.json that has none.
    """

    theta: float = 10000.0
    partial: float | None = None
    interleaved: bool = False
    default: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: tuple[str, ...] = ("rope_parameters", "rope_theta", "rope_scaling")

    def __post_init__(self) -> None:
        if self.partial is not None:
            object.__setattr__(self, "keys", (*self.keys, "partial_rotary_factor"))

    def flags(self, config: Config) -> dict[str, Any]:
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        rope = config.get(key) or self.default
        if not isinstance(rope, Mapping):
            raise HelixError(f"config.json sets {key} = {rope!r:.80}. It must be an object.")
        rope = dict(rope)
        flags: dict[str, Any] = {
            "position_embedding_type": "rope",
            "rotary_base": self._theta(rope, config),
            "rotary_percent": self._share(rope, config),
            "rotary_interleaved": self.interleaved,
            "use_rope_scaling": False,
            "rotary_seq_len_interpolation_factor": None,
        }
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        if "factor" in rope:
            check_field("factor", "rope_scaling_factor", rope["factor"])
        if kind == "llama3":
            flags |= _llama3(rope)
        elif kind == "yarn":
            flags |= _yarn(rope, config)
        elif kind == "linear":
            flags["rotary_seq_len_interpolation_factor"] = float(needed(rope, "factor"))
        elif kind != "default":
            raise HelixError(
                f"config.json asks for rotary embedding of type {kind!r} (rope_parameters or "
                "rope_scaling), which Megatron's GPT does not have. Valid: default, linear, llama3, yarn."
            )
        for key in ("factor", "original_max_position_embeddings"):
            rope.pop(key, None)  # read already, or of a type that does not read it
        if rope:
            raise HelixError(
                f"config.json sets {listed(rope)} for rotary embedding of type {kind}, which Megatron's GPT "
                "does not have. Delete them if they change nothing."
            )
        return flags

    def _theta(self, rope: dict[str, Any], config: Config) -> float:
        theta = rope.pop("rope_theta", None)
        if theta is None:
            theta = needed(config, "rope_theta", self.theta)
        check_field("rope_theta", "rotary_base", theta)
        return int(theta) if theta == int(theta) else float(theta)

    def _share(self, rope: dict[str, Any], config: Config) -> float:
        share = rope.pop("partial_rotary_factor", None)
        if share is None and self.partial is not None:
            share = needed(config, "partial_rotary_factor", self.partial)
        check_field("partial_rotary_factor", "rotary_percent", share)
        if self.partial is None and share not in (None, 1):
            raise HelixError(
                f"config.json sets partial_rotary_factor = {share}, which models of this family do not have."
            )
        return 1.0 if share is None else float(share)

    def config(self, model: ModelConfig) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": float(model.rotary_base), "rope_type": "default"}
        if model.use_rope_scaling:
            factors = {
                "factor": model.rope_scaling_factor,
                "high_freq_factor": model.rope_high_freq_factor,
            }
            rope |= {"rope_type": "llama3", **factors, **LLAMA3}
        elif "yarn" in model.traits:
            rope |= {
                "rope_type": "yarn",
                "factor": model.yarn_rotary_scaling_factor,
                "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
                "beta_fast": model.yarn_beta_fast,
                "beta_slow": model.yarn_beta_slow,
                "truncate": model.yarn_correction_range_round_to_int,
            }
            if (model.yarn_mscale, model.yarn_mscale_all_dim) != (1, 0):
                rope |= {
                    "mscale": model.yarn_mscale,
                    "mscale_all_dim": model.yarn_mscale_all_dim,
                }
        elif model.rotary_seq_len_interpolation_factor is not None:
            rope |= {"rope_type": "linear", "factor": model.rotary_seq_len_interpolation_factor}
        share = {"partial_rotary_factor": model.rotary_percent} if self.partial is not None else {}
        return {"rope_parameters": rope | share, **older_spelling(rope), **share}


# What Megatron has as constants.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}


def _llama3(rope: dict[str, Any]) -> dict[str, Any]:
    """Flags of the scaling of Llama 3.1 and later; takes what it reads out of `rope`."""
    for key, value in LLAMA3.items():
        given = rope.pop(key, value)
        if given != value:
            raise HelixError(
                f"config.json sets {key} = {given} of llama3 rotary embedding. Megatron's GPT has {value} only."
            )
    high = needed(rope, "high_freq_factor", 4.0)
    rope.pop("high_freq_factor", None)
    check_field("high_freq_factor", "rope_high_freq_factor", high)
    return {
        "use_rope_scaling": True,
        "rope_high_freq_factor": float(high),
        "rope_scaling_factor": float(needed(rope, "factor")),
    }


def _yarn(rope: dict[str, Any], config: Config) -> dict[str, Any]:
    """Flags of yarn (arXiv 2309.00071) as transformers computes it; takes what it reads out of `rope`.

    Both grow cosine and sine by the same factor, which Megatron has as a quotient of two.
    """
    factor = float(needed(rope, "factor"))
    original = rope.pop("original_max_position_embeddings", None)
    if original is None:
        original = needed(config, "max_position_embeddings")
    fast, slow = rope.pop("beta_fast", None) or 32.0, rope.pop("beta_slow", None) or 1.0
    scale, all_dims = rope.pop("mscale", None), rope.pop("mscale_all_dim", None)
    truncate = rope.pop("truncate", True)
    given = rope.pop("attention_factor", None)
    for key, field, value in (
        ("original_max_position_embeddings", "yarn_original_max_position_embeddings", original),
        ("beta_fast", "yarn_beta_fast", fast),
        ("beta_slow", "yarn_beta_slow", slow),
        ("mscale", "yarn_mscale", scale),
        ("mscale_all_dim", "yarn_mscale_all_dim", all_dims),
        ("truncate", "yarn_correction_range_round_to_int", truncate),
    ):
        check_field(key, field, value)
    if not (scale and all_dims):
        scale, all_dims = 1.0, 0.0
    grown = 0.1 * math.log(max(factor, 1.0))
    own = (scale * grown + 1.0) / (all_dims * grown + 1.0)
    if given is not None and not (isinstance(given, float) and math.isclose(given, own)):
        raise HelixError(
            f"config.json sets attention_factor = {given!r:.40} of yarn rotary embedding. Megatron's GPT has "
            f"what follows from factor, mscale and mscale_all_dim only, here {own}."
        )
    return {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": original,
        "yarn_beta_fast": float(fast),
        "yarn_beta_slow": float(slow),
        "yarn_mscale": float(scale),
        "yarn_mscale_all_dim": float(all_dims),
        "yarn_correction_range_round_to_int": truncate,
    }


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


def beyond_max_window_layers(config: Config, layer: int) -> bool:
    """Whether a layer of Qwen2 has the window, where `layer_types` does not say."""
    return bool(config.get("use_sliding_window", False)) and layer >= _max_window_layers(config)


def every_second_below_max_window_layers(config: Config, layer: int) -> bool:
    """As above, of Qwen2-MoE."""
    within = layer < _max_window_layers(config) and layer % 2 == 0
    return bool(config.get("use_sliding_window", False)) and within


def _max_window_layers(config: Config) -> int:
    return int(needed(config, "max_window_layers", 28))


@dataclass(frozen=True)
class LayerWindows(Piece):
    """A sliding window in some layers, listed in `layer_types`.

    Args:
        windowed: of a configuration and a layer's number: whether it has the window where there is no list.
        default: `sliding_window` when the key is absent.
        switch: whether the window counts only if `use_sliding_window` is set.
    """

    windowed: Callable[[Config, int], bool] = beyond_max_window_layers
    default: int | None = 4096
    switch: bool = True
    keys: tuple[str, ...] = (
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
    )
    fields: ClassVar = WINDOW_FIELDS

    def flags(self, config: Config) -> dict[str, Any]:
        layers = needed(config, "num_hidden_layers")
        used = not self.switch or config.get("use_sliding_window", False)
        window, types = config.get("sliding_window", self.default), config.get("layer_types")
        if types is None:
            sliding = [self.windowed(config, layer) for layer in range(layers)]
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

    def config(self, model: ModelConfig) -> dict[str, Any]:
        window = model.window_size
        names = {True: "sliding_attention", False: "full_attention"}
        switch = {"use_sliding_window": window is not None} if self.switch else {}
        return switch | {
            "sliding_window": None if window is None else window + 1,
            "layer_types": [names[one] for one in model.windowed_layers],
        }


@dataclass(frozen=True)
class LayersWithoutRope(Piece):
    """Layers without rotary embedding: those with 0 in `no_rope_layers`, or every n-th."""

    interval: int = 4
    keys: tuple[str, ...] = ("no_rope_layers", "no_rope_layer_interval")
    fields: ClassVar = {"no_rope_layer_interval": "num_layers"}

    def flags(self, config: Config) -> dict[str, Any]:
        return {
            "no_rope_freq": [int(not turned) for turned in layers_with_rope(config, self.interval)]
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {"no_rope_layers": [int(not without) for without in model.layers_without_rope]}


def layers_with_rope(config: Config, interval: int) -> list[int]:
    """`no_rope_layers`, which has a 1 for each layer *with* rotary embedding, or what stands for its absence.

    Raises:
        HelixError: no such list, or of another length.
    """
    layers, given = needed(config, "num_hidden_layers"), config.get("no_rope_layers")
    if not given:
        step = needed(config, "no_rope_layer_interval", interval)
        return [int((layer + 1) % step != 0) for layer in range(layers)]
    if not is_pattern(given) or len(given) != layers:
        raise HelixError(
            f"config.json sets no_rope_layers = {given!r:.80}. It must be a list of 0 and 1 for its {layers} "
            "layers."
        )
    return list(given)
