"""Pieces of `config.json` that several families share."""

from __future__ import annotations

import dataclasses
from typing import Any

from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.pieces import Activation, Always, Values, Vocabulary


def keys(**defaults: Any) -> Values:
    """Fields of a model under their usual keys, with the family's defaults; `...` where a key must be there."""
    usual = {
        f.name: f.metadata["config"] for f in dataclasses.fields(ModelConfig) if f.name in defaults
    }
    return Values(**{usual[name]: (name, default) for name, default in defaults.items()})


SIZES = keys(num_layers=..., hidden_size=..., attention_dropout=0.0, init_method_std=0.02)
DENSE_SIZE = keys(ffn_hidden_size=...)
NO_BIASES = Always(disable_bias_linear=True, add_qkv_bias=False)
QKV_BIASES = Always(disable_bias_linear=True, add_qkv_bias=True)
RMS_NORM = Always(normalization="RMSNorm", apply_layernorm_1p=False)
QK_NORM = Always(qk_layernorm=True)
SILU = Activation("hidden_act", "silu", {"silu": {"swiglu": True}, "swish": {"swiglu": True}})
LLAMA_LIKE = (SIZES, DENSE_SIZE, Vocabulary(), RMS_NORM, SILU)
