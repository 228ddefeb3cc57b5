"""Maps between Hugging Face checkpoints and canonical ones, family by family.

`family_of` finds the family of a `config.json`; its `model_flags` and `config` convert the configuration, its
`rules` the tensors, one canonical tensor at a time. No tensor is touched before a rule is asked to; torch is
imported only then, `transformers` never.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from helix_megatron.checkpoint.families.family import Family
from helix_megatron.checkpoint.families.rules import Rule
from helix_megatron.checkpoint.families.tables import FAMILIES
from helix_megatron.errors import HelixError, listed

__all__ = ["FAMILIES", "Family", "Rule", "family_for_flags", "family_named", "family_of"]


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `model_type`.

    Raises:
        HelixError: none, or one that is not known here; lists those that are.
    """
    name = config.get("model_type")
    if not isinstance(name, str):
        known = [family.architecture for family in FAMILIES.values()]
        for family in FAMILIES.values():
            if family.architecture in (config.get("architectures") or ()):
                return family
        raise HelixError(
            "config.json has no model_type, by which the family of a model is known, and none of the "
            f"architectures {listed(known)}."
        )
    return family_named(name)


def family_named(name: str) -> Family:
    """The family whose `model_type` is `name`.

    Raises:
        HelixError: unknown; names the nearest.
    """
    if name not in FAMILIES:
        close = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise HelixError(f"model family {name!r} is unknown. Valid: {listed(FAMILIES)}.{hint}")
    return FAMILIES[name]


def family_for_flags(flags: Mapping[str, Any]) -> Family:
    """The first family that can express a model trained here.

    Raises:
        HelixError: none can; names the family that comes nearest, and what differs.
    """
    nearest: tuple[int, str, list[str]] | None = None
    for family in FAMILIES.values():
        differences = family.differences(flags)
        if not differences:
            return family
        if nearest is None or len(differences) < nearest[0]:
            nearest = len(differences), family.name, differences
    assert nearest is not None
    raise HelixError(
        "no family of Hugging Face models can express these model flags. Nearest is "
        f"{nearest[1]}, which cannot have {listed(nearest[2])}. Known families: {listed(FAMILIES)}."
    )
