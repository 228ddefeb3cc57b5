"""The model flags that decide what a model computes, and their defaults.

Model flags are the training script's (`helix_megatron.training.arguments`). Those here decide the function
from tokens to logits and the shapes of the weights; the others (dropout, losses, initial weights, sequence
length) belong to training and are free in a comparison of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FUNCTION_FLAGS: dict[str, Any] = {
    "num_layers": None,
    "hidden_size": None,
    "ffn_hidden_size": None,
    "num_attention_heads": None,
    "num_query_groups": None,
    "kv_channels": None,
    "max_position_embeddings": None,
    "padded_vocab_size": None,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "embedding_multiplier": 1.0,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "apply_layernorm_1p": False,
    "swiglu": False,
    "geglu": False,
    "openai_gelu": False,
    "disable_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "window_size": None,
    "window_attn_skip_freq": None,
    "untie_embeddings_and_output_weights": False,
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
}
ROTARY = tuple(name for name in FUNCTION_FLAGS if name.startswith(("rotary_", "rope_", "use_rope")))
EXPERTS = tuple(name for name in FUNCTION_FLAGS if name.startswith("moe_"))


def complete(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags, and those of `FUNCTION_FLAGS` that are missing, with what follows from others filled in."""
    full = {**FUNCTION_FLAGS, **flags}
    heads = full["num_attention_heads"]
    if not flags.get("group_query_attention"):
        full["num_query_groups"] = heads
    if full["kv_channels"] is None:
        full["kv_channels"] = full["hidden_size"] // heads
    if full["ffn_hidden_size"] is None:
        full["ffn_hidden_size"] = 4 * full["hidden_size"]
    if full["num_experts"] is not None and full["moe_ffn_hidden_size"] is None:
        full["moe_ffn_hidden_size"] = full["ffn_hidden_size"]
    if full["max_position_embeddings"] is None:
        full["max_position_embeddings"] = flags.get("seq_length")
    if full["padded_vocab_size"] is None:
        full["padded_vocab_size"] = flags.get("vocab_size")
    return full


def function_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags make the model compute: equal exactly for flags that describe the same function.

    All of `FUNCTION_FLAGS`. What has no effect (rotary settings without rotary embedding) gets its default;
    patterns of layers become lists.
    """
    complete_flags = complete(flags)
    full = {name: complete_flags[name] for name in FUNCTION_FLAGS}
    _use_defaults(full, ROTARY, unless=full["position_embedding_type"] == "rope")
    _use_defaults(full, ("rope_scaling_factor",), unless=full["use_rope_scaling"])
    _use_defaults(full, ("add_qkv_bias",), unless=full["disable_bias_linear"])
    _use_defaults(full, EXPERTS, unless=full["num_experts"] is not None)
    shared = full["moe_shared_expert_intermediate_size"] is not None
    _use_defaults(full, ("moe_shared_expert_gate",), unless=shared)
    full["window_attn_skip_freq"] = windowed_layers(full)
    full["moe_layer_freq"] = expert_layers(full)
    if all(full["moe_layer_freq"]):  # a model without dense layers has no use for their size
        full["ffn_hidden_size"] = None
    return full


def expert_layers(flags: Mapping[str, Any]) -> list[bool]:
    """Which layers are MoE layers: every n-th, beginning with the first, or those of a list."""
    layers, frequency = flags["num_layers"], flags.get("moe_layer_freq", 1)
    if flags.get("num_experts") is None:
        return [False] * layers
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(layers)]
    return [bool(one) for one in frequency]


def windowed_layers(flags: Mapping[str, Any]) -> list[bool]:
    """Which layers see a sliding window: all, all but every n-th, or those of a list."""
    layers, skip = flags["num_layers"], flags.get("window_attn_skip_freq")
    if flags.get("window_size") is None:
        return [False] * layers
    if skip is None:
        return [True] * layers
    if isinstance(skip, int):
        return [(layer + 1) % skip != 0 for layer in range(layers)]
    return [bool(one) for one in skip]


def _use_defaults(full: dict[str, Any], names: tuple[str, ...], *, unless: bool) -> None:
    if not unless:
        full.update({name: FUNCTION_FLAGS[name] for name in names})
