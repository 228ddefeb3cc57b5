"""Rotary embedding of two kinds of layers in `config.json`: those with a window, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.pieces import Config, needed
from helix_megatron.model.families.positions import Rope

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class TwoBases(Rope):
    """`rope_parameters` of either kind of layer; older files have those of layers without a window only.

    Layers with a window have no scaling.

    Args:
        local: the base of layers with a window when it is not given.
        local_key: what older files call it; None where they have no such key.
    """

    local: float = 10000.0
    local_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_key is not None:
            object.__setattr__(self, "keys", (*self.keys, self.local_key))

    def flags(self, config: Config) -> dict[str, Any]:
        given = config.get("rope_parameters") or {}
        # transformers 5.2 writes defaults of both kinds beside them.
        beside = {"rope_type", "rope_theta"} if FULL in given and SLIDING in given else set()
        if not isinstance(given, Mapping) or given.keys() - {FULL, SLIDING} - beside:
            raise HelixError(
                f"config.json sets rope_parameters = {given!r:.80}. It must be an object with {FULL} and "
                f"{SLIDING}."
            )
        full = given.get(FULL) or config.get("rope_scaling") or {}
        base = self.local if self.local_key is None else needed(config, self.local_key, self.local)
        near = {"rope_theta": base, **(given.get(SLIDING) or {})}
        if "factor" in near:
            raise HelixError(
                f"config.json sets rope_parameters = {given!r:.120}. Of two bases only that of layers "
                "without a window may be scaled."
            )
        flags = super().flags({**config, "rope_scaling": None, "rope_parameters": full})
        local = super().flags({"rope_parameters": near})
        return flags | {"rotary_base_windowed": local["rotary_base"]}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        full = super().config(model)
        base = float(model.rotary_base_windowed or model.rotary_base)
        near = {"rope_type": "default", "rope_theta": base}
        parameters = {FULL: full["rope_parameters"], SLIDING: near}
        older = {} if self.local_key is None else {self.local_key: base}
        return full | {"rope_parameters": parameters, **older}
