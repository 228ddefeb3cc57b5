"""Sizes of models that the conversion does not know: config.json → model flags, and what these do not say.

Only sizes: the planner counts parameters, bytes and FLOPs, and needs neither the router's function nor how
rotary frequencies are scaled. Both config.json files and presets are read by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from helix_megatron.errors import HelixError
from helix_megatron.plan.mixers import Latent, Linear, Special, gated_delta_net, mamba2

Config = Mapping[str, Any]
Outline = tuple[dict[str, Any], Special]


def outline_of(config: Config) -> Outline | None:
    """Model flags and what they leave out; None where the model type has no outline.

    Raises:
        HelixError: a size is missing; names the key.
    """
    read = OUTLINES.get(str(config.get("model_type", "")))
    try:
        return None if read is None else read(config)
    except KeyError as error:
        problem = f"config.json has no {error.args[0]}, which {config['model_type']} models have."
        raise HelixError(problem) from error
    except (TypeError, AttributeError) as error:
        raise HelixError(
            f"config.json has a value of another type than a size: {error}."
        ) from error


def text_config(config: Config) -> Config:
    """The part of a config.json that describes the language model, where it describes others as well."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return config
    outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return outer | dict(inner)


def _usual(config: Config, **others: Any) -> dict[str, Any]:
    """What nearly all have: sizes, grouped-query attention, a gated MLP, RMSNorm and no biases."""
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "group_query_attention": True,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"],
        "ffn_hidden_size": config.get("intermediate_size"),
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config.get("max_position_embeddings"),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "disable_bias_linear": True,
        "swiglu": True,
        "normalization": "RMSNorm",
    } | others


def _experts(
    config: Config, number: str, ffn: int, shared: int = 0, dense: int = 0
) -> dict[str, Any]:
    """Experts in all layers but the first `dense`."""
    layers = config["num_hidden_layers"]
    if dense >= layers:
        return {}
    return {
        "num_experts": config[number],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_ffn_hidden_size": ffn,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
    }


def _layer_types(config: Config, name: str) -> list[int]:
    return [int(kind == name) for kind in config["layer_types"]]


def _qwen3_5(config: Config) -> Outline:
    delta = gated_delta_net(
        config["linear_num_key_heads"],
        config["linear_num_value_heads"],
        config["linear_key_head_dim"],
        config["linear_value_head_dim"],
        config["linear_conv_kernel_dim"],
    )
    flags = _usual(config, qk_layernorm=True, attention_output_gate=True, rotary_percent=0.25)
    if "num_experts" in config:
        shared = config["shared_expert_intermediate_size"]
        flags |= _experts(config, "num_experts", config["moe_intermediate_size"], shared)
    layers, every = config["num_hidden_layers"], config.get("full_attention_interval", 4)
    linear = layers - layers // every
    if config.get("layer_types"):
        linear = sum(_layer_types(config, "linear_attention"))
    return flags, Special(linear=delta, linear_layers=linear)


def _nemotron_h(config: Config) -> Outline:
    newer = {
        "linear_attention": "mamba",
        "full_attention": "attention",
    }  # what transformers 5 writes
    kinds: Sequence[str] = [
        newer.get(kind, kind) for kind in config.get("layers_block_type") or ()
    ] or [
        {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}[letter]
        for letter in config["hybrid_override_pattern"]
    ]
    scan: Linear = mamba2(
        config["mamba_num_heads"],
        config["mamba_head_dim"],
        config["n_groups"],
        config["ssm_state_size"],
        config["conv_kernel"],
    )
    config = {**config, "num_hidden_layers": len(kinds)}
    flags = _usual(config, swiglu=False, position_embedding_type="none")
    if "moe" in kinds:
        flags |= _experts(
            config,
            "n_routed_experts",
            config["moe_intermediate_size"],
            config["moe_shared_expert_intermediate_size"],
        )
        flags["moe_layer_freq"] = [int(kind == "moe") for kind in kinds]
    return flags, Special(
        linear=scan,
        linear_layers=kinds.count("mamba"),
        separate=True,
        attention_layers=kinds.count("attention"),
        expert_width=config.get("moe_latent_size") or 0,
        wide_router="moe" in kinds,
    )


def _scan(config: Config, *, norm: bool = True) -> Linear:
    """Mamba as Bamba, Granite 4 and Falcon-H1 call its sizes."""
    sizes = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    heads, dims, *others = (config[name] for name in sizes)
    if dims == "auto":
        inner = config["model_type"] == "falcon_h1" and config.get("mamba_d_ssm")
        dims = (inner or config.get("mamba_expand", 2) * config["hidden_size"]) // heads
    return mamba2(heads, dims, *others, norm=norm)


def _falcon_h1(config: Config) -> Outline:
    scan = _scan(config, norm=bool(config.get("mamba_rms_norm")))
    linear = config["num_hidden_layers"]
    return _usual(config), Special(linear=scan, linear_layers=linear, beside=True)


def _bamba(config: Config) -> Outline:
    layers = config["num_hidden_layers"] - len(config.get("attn_layer_indices") or ())
    return _usual(config), Special(linear=_scan(config), linear_layers=layers)


def _granite_hybrid(config: Config) -> Outline:
    """Older files call the kinds of layers mamba and attention."""
    layers, ffn = config["num_hidden_layers"], config["shared_intermediate_size"]
    kinds = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * layers
    linear = sum(kind in ("mamba", "linear_attention") for kind in kinds)
    flags = _usual(config, ffn_hidden_size=ffn)
    if config.get("num_local_experts"):
        flags |= _experts(config, "num_local_experts", config["intermediate_size"], ffn)
    return flags, Special(linear=_scan(config), linear_layers=linear)


def _gemma4(config: Config) -> Outline:
    """The global layers are those that flags describe: they have the fewest key-value heads."""
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if config.get(key):
            raise HelixError(
                f"config.json sets {key} = {config[key]}, and the planner does not count layers that share "
                "keys or have inputs of their own (Gemma 4 E2B and E4B). Valid: 0."
            )
    full = [at for at, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
    per_layer = config.get("per_layer_config", {})  # what transformers 5 writes
    own = per_layer.get(str(full[0]), {}) if full else {}
    flags = _usual(
        config,
        swiglu=False,
        geglu=True,
        qk_layernorm=True,
        num_query_groups=config.get("num_global_key_value_heads")
        or own.get("num_key_value_heads", config["num_key_value_heads"]),
        kv_channels=config.get("global_head_dim") or own.get("head_dim", config["head_dim"]),
        window_size=config["sliding_window"],
        window_attn_skip_freq=_layer_types(config, "sliding_attention"),
    )
    if config.get("num_experts"):  # a dense MLP beside them, as a shared expert is
        topk = {"num_experts_per_tok": config["top_k_experts"]}
        ffn, dense = config["moe_intermediate_size"], config["intermediate_size"]
        flags |= _experts({**config, **topk}, "num_experts", ffn, dense)
    local = config["num_key_value_heads"], config["head_dim"]
    return flags, Special(local=local, values_are_keys=config.get("attention_k_eq_v", False))


def _gpt_oss(config: Config) -> Outline:
    flags = _usual(
        config,
        disable_bias_linear=False,
        window_size=config["sliding_window"],
        window_attn_skip_freq=_layer_types(config, "sliding_attention"),
    )
    return flags | _experts(config, "num_local_experts", config["intermediate_size"]), Special()


def _glm4_moe(config: Config) -> Outline:
    ffn, dense = config["moe_intermediate_size"], config["first_k_dense_replace"]
    flags = _usual(config, add_qkv_bias=True, rotary_percent=0.5)
    flags["qk_layernorm"] = bool(config.get("use_qk_norm"))
    shared = ffn * config["n_shared_experts"]
    return flags | _experts(config, "n_routed_experts", ffn, shared, dense), Special()


def _minimax_m2(config: Config) -> Outline:
    flags = _usual(
        config, rotary_percent=config.get("rotary_dim", config["head_dim"]) / config["head_dim"]
    )
    return flags | _experts(config, "num_local_experts", config["intermediate_size"]), Special()


def _llama4(config: Config) -> Outline | None:
    """Chunks of attention are counted as whole sequences: they are longer than most jobs."""
    if config.get("interleave_moe_layer_step", 1) != 1:
        return None  # dense layers of another width (Maverick), which the conversion reads
    ffn = config["intermediate_size"]
    flags = _usual(config, moe_router_pre_softmax=True)
    return flags | _experts(config, "num_local_experts", ffn, shared=ffn), Special()


def _deepseek_v3(config: Config) -> Outline:
    latent = Latent(
        config.get("q_lora_rank") or 0,
        config["kv_lora_rank"],
        config["qk_rope_head_dim"],
        config["qk_nope_head_dim"],
        config["v_head_dim"],
    )
    flags = _usual({**config, "head_dim": latent.value})
    ffn, dense = config["moe_intermediate_size"], config["first_k_dense_replace"]
    shared = ffn * config["n_shared_experts"]
    flags |= _experts(config, "n_routed_experts", ffn, shared, dense)
    return flags, Special(latent=latent, wide_router=True)


OUTLINES: dict[str, Callable[[Config], Outline | None]] = {
    "bamba": _bamba,
    "falcon_h1": _falcon_h1,
    "granitemoehybrid": _granite_hybrid,
    "qwen3_5": _qwen3_5,
    "qwen3_5_text": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "qwen3_5_moe_text": _qwen3_5,
    "qwen3_next": _qwen3_5,
    "nemotron_h": _nemotron_h,
    "gemma4_text": _gemma4,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "minimax_m2": _minimax_m2,
    "llama4_text": _llama4,
    "deepseek_v2": _deepseek_v3,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
}
