"""The families of Hugging Face models, one file for each.

A family maps `config.json` and the tensors to those of a canonical checkpoint and back, and names the modules
by which a model of `transformers` is cut. `family_of` finds the family of a `config.json`; its `model_flags`
and `config` convert the configuration, its `rules` the tensors, one canonical tensor at a time. No tensor is
touched before a rule is asked to; torch is imported only then, `transformers` never.

Sources: the configuration and model classes of the `transformers` package (their defaults are the defaults
here) and the names that its `save_pretrained` writes. To add a family, write one file with pieces for every key
that decides what the model computes and rows for its tensors (most share `tensors.LLAMA_LAYER`), and list it
here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.families import (
    bamba,
    deepseek_v2,
    deepseek_v3,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm4,
    glm4_moe,
    gpt2,
    gpt_oss,
    granite,
    granitemoe,
    granitemoehybrid,
    hunyuan_v1_dense,
    llama,
    llama4,
    minimax_m2,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron_h,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    smollm3,
    starcoder2,
)
from helix_megatron.model.families.family import IMPOSSIBLE, Family

# In the order in which a model that was trained here looks for a family.
FAMILIES = {
    module.FAMILY.name: module.FAMILY
    for module in (
        *(llama, mistral, qwen2, qwen3, gemma, gpt2, mixtral, qwen2_moe, qwen3_moe, ministral),
        *(smollm3, granite, ernie4_5, phi3, starcoder2, granitemoe, glm4_moe, gpt_oss, llama4),
        *(glm4, exaone4, gemma2, gemma3, olmo2, olmo3, minimax_m2, ministral3),
        *(qwen3_next, qwen3_5, qwen3_5_moe, deepseek_v2, deepseek_v3, nemotron_h, hunyuan_v1_dense),
        *(granitemoehybrid, bamba),
    )
}
# Types of files whose models are those of a family. transformers knows them by code in the files, if at all,
# which is never run.
READ_AS = {"kimi_k2": "deepseek_v3"}
# What conversion cannot express, of model types that Hugging Face's host cuts all the same.
INEXPRESSIBLE = {
    "apertus": "an activation with learned numbers (hidden_act xielu)",
    "falcon_h1": "attention and Mamba side by side in every layer",
    "gemma4": "heads of two sizes (global_head_dim)",
    "gemma4_text": "heads of two sizes (global_head_dim)",
    "mimo_v2_flash": "values of another size than keys (v_head_dim)",
}
CUTTABLE = {name: family.modules for name, family in FAMILIES.items() if family.modules is not None}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its `model_type`.

    Raises:
        HelixError: none, or one that is not known here; lists those that are.
    """
    name, architectures = config.get("model_type"), config.get("architectures") or ()
    if not isinstance(name, str | None):
        raise HelixError(f"config.json sets model_type = {name!r:.80}. It must be a text.")
    if not isinstance(architectures, list | tuple):
        raise HelixError(
            f"config.json sets architectures = {architectures!r:.80}. It must be a list of texts."
        )
    if name is None:
        known = [family.architecture for family in FAMILIES.values()]
        for family in FAMILIES.values():
            if family.architecture in architectures:
                return family
        raise HelixError(
            "config.json has no model_type, by which the family of a model is known, and none of the "
            f"architectures {listed(known)}."
        )
    return family_named(name)


def family_named(name: str) -> Family:
    """The family whose `model_type` is `name`.

    Raises:
        HelixError: conversion cannot express it, with what is in the way; or it is unknown, with the nearest.
    """
    if name in INEXPRESSIBLE:
        raise HelixError(
            f"models of type {name} have {INEXPRESSIBLE[name]}, which conversion cannot express. Without it "
            "helix_megatron.huggingface cuts them in place."
        )
    name = READ_AS.get(name, name)
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
    nearest: tuple[tuple[bool, int], str, list[str]] | None = None
    for family in FAMILIES.values():
        differences = family.differences(flags)
        if not differences:
            return family
        distance = differences[0].startswith(IMPOSSIBLE), len(differences)
        if nearest is None or distance < nearest[0]:
            nearest = distance, family.name, differences
    assert nearest is not None
    raise HelixError(
        "no family of Hugging Face models can express these model flags. Nearest is "
        f"{nearest[1]}, which cannot have {listed(nearest[2])}. Known families: {listed(FAMILIES)}."
    )
