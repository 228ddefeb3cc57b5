"""Nemotron 3 (nemotron_h): each layer is Mamba, attention without positions, an MLP, or experts, alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import NO_BIASES, RMS_NORM, keys
from helix_megatron.model.families.delta_net import FULL, LINEAR
from helix_megatron.model.families.experts import BalancedExperts
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.mamba import ATTENTION, MAMBA_EPSILON, OLDER, mamba_rows
from helix_megatron.model.families.pieces import (
    Always,
    Config,
    Heads,
    Only,
    Piece,
    Unread,
    Values,
    Vocabulary,
    needed,
)
from helix_megatron.model.sizes import MAMBA_KERNEL

LETTERS = {LINEAR: "M", FULL: "*", "moe": "E", "mlp": "-"}


def pattern_of(config: Config) -> str:
    """One letter for each layer: of `layers_block_type`, else `hybrid_override_pattern` of older files."""
    types, older = config.get("layers_block_type"), config.get("hybrid_override_pattern")
    if types is None and older is None:
        return "ME*-"  # that of a configuration which does not say
    if types is None and isinstance(older, str) and not set(older) - {*LETTERS.values()}:
        return older
    known = isinstance(types, list) and all(isinstance(kind, str) for kind in types)
    newer = [OLDER.get(kind, kind) for kind in types] if known and types else []
    if not newer or set(newer) - LETTERS.keys():
        raise HelixError(
            f"config.json sets layers_block_type = {types!r:.120} and hybrid_override_pattern = "
            f"{older!r:.80}. It must have a list with one of {listed(LETTERS)} for each layer, or a text with "
            f"one of {listed(LETTERS.values())} for each."
        )
    return "".join(LETTERS[kind] for kind in newer)


class Layers(Piece):
    """What each layer is; transformers counts them and ignores `num_hidden_layers`."""

    keys = ("layers_block_type", "hybrid_override_pattern", "num_hidden_layers")

    def flags(self, config: Config) -> dict[str, Any]:
        pattern = pattern_of(config)
        return {"hybrid_layer_pattern": pattern, "num_layers": len(pattern)}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        names = {letter: name for name, letter in LETTERS.items()}
        pattern = model.hybrid_layer_pattern or "*" * model.num_layers
        return {"layers_block_type": [names[letter] for letter in pattern]}


@dataclass(frozen=True)
class ExpertLayers(BalancedExperts):
    """Experts beside one that all tokens share, where a layer has them."""

    keys: tuple[str, ...] = (
        *(key for key in BalancedExperts.keys if key != "first_k_dense_replace"),
        "moe_shared_expert_intermediate_size",
        "moe_latent_size",
    )
    fields: ClassVar = BalancedExperts.fields | {
        name: name for name in ("moe_shared_expert_intermediate_size", "moe_latent_size")
    }

    def flags(self, config: Config) -> dict[str, Any]:
        if "E" not in pattern_of(config):
            return {}
        all_layers = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "n_shared_experts": 1}
        size = needed(config, "moe_intermediate_size", 7688)
        found = super().flags({**config, **all_layers, "moe_intermediate_size": size})
        shared = needed(config, "moe_shared_expert_intermediate_size", 7688)
        latent = {"moe_latent_size": config.get("moe_latent_size")}
        return found | latent | {"moe_shared_expert_intermediate_size": shared}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if not any(model.moe_layers):
            return {}
        written = super().config(model)
        del written["first_k_dense_replace"]
        shared = model.moe_shared_expert_intermediate_size or written["moe_intermediate_size"]
        written |= {"n_shared_experts": 1, "moe_shared_expert_intermediate_size": shared}
        return written | {"moe_latent_size": model.moe_latent_size}


# By which transformers reads keys of older files, too.
OTHER_NAMES = (
    *("mamba_n_groups", "mamba_d_conv", "mamba_expand", "mamba_conv_bias", "mamba_chunk_size"),
    *("mamba_dt_min", "mamba_dt_max", "mamba_dt_limit", "mamba_dt_init_floor"),
)
ROWS = (
    *mamba_rows("mixer", "norm"),
    *(
        replace(
            row,
            sources=row.sources.replace("self_attn.", "mixer.").replace("input_layernorm", "norm"),
        )
        for row in ATTENTION
    ),
    Row("mlp.linear_fc1.layer_norm_weight", "norm.weight[D]", when="dense"),
    Row("mlp.linear_fc1.weight", "mixer.up_proj.weight[F,D]", when="dense"),
    Row("mlp.linear_fc2.weight", "mixer.down_proj.weight[D,F]", when="dense"),
    Row("pre_mlp_layernorm.weight", "norm.weight[D]", when="experts"),
    Row("mlp.router.weight", "mixer.gate.weight[E,D]", when="experts"),
    Row("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias[E]", when="experts"),
    *(
        Row(f"mlp.{own}.{fc}.weight", f"mixer.{own}.{proj}.weight[{shape}]", when="experts")
        for own, width, size in (("experts.{expert}", "Md", "M"), ("shared_experts", "D", "S"))
        for fc, proj, shape in (
            ("linear_fc1", "up_proj", f"{size},{width}"),
            ("linear_fc2", "down_proj", f"{width},{size}"),
        )
    ),
    *(
        Row(f"mlp.{name}.weight", f"mixer.{name}.weight[{shape}]", when="expert-latent")
        for name, shape in (("fc1_latent_proj", "Md,D"), ("fc2_latent_proj", "D,Md"))
    ),
)

FAMILY = Family(
    name="nemotron_h",
    architecture="NemotronHForCausalLM",
    prefix="backbone.",
    layer="layers",
    pieces=(
        Layers(),
        keys(hidden_size=..., ffn_hidden_size=21504, attention_dropout=0.0, init_method_std=0.02),
        keys(max_position_embeddings=4096),
        Vocabulary(),
        RMS_NORM,
        NO_BIASES,
        Always(
            position_embedding_type="none",
            squared_relu=True,
            untie_embeddings_and_output_weights=True,
            norm_epsilon=MAMBA_EPSILON,
        ),
        Heads(kv_heads=8, head_dim=128, explicit=True),
        Values(
            mamba_num_heads=("mamba_num_heads", 128),
            mamba_head_dim=("mamba_head_dim", 64),
            ssm_state_size=("mamba_state_dim", 128),
            n_groups=("mamba_num_groups", 8),
            time_step_min=("mamba_time_step_min", 0.001),
        ),
        ExpertLayers(number=8, topk=2, scaling=1.0, dense=0),
        # Of Mamba's convolution Megatron knows one length.
        Only(
            layer_norm_epsilon=(MAMBA_EPSILON,), conv_kernel=(MAMBA_KERNEL,), use_conv_bias=(True,)
        ),
        Only(mlp_hidden_act=("relu2",), mamba_hidden_act=("silu",), tie_word_embeddings=(False,)),
        Only(attention_bias=(False,), mlp_bias=(False,), use_bias=(False,)),
        Only(sliding_window=(None,)),
        Only(**dict.fromkeys(OTHER_NAMES, (None,))),
        Unread(
            "chunk_size", "expand", "hidden_dropout", "mamba_proj_bias", "mamba_ssm_cache_dtype"
        ),
        Unread("moe_shared_expert_overlap", "num_logits_to_keep", "rescale_prenorm_residual"),
        Unread("residual_in_fp32", "time_step_floor", "time_step_limit", "time_step_max"),
        Unread("use_mamba_kernels", "num_nextn_predict_layers", "mtp_layers_block_type"),
        Unread("mtp_hybrid_override_pattern"),
    ),
    rows=ROWS,
    outer=(
        Row("embedding.word_embeddings.weight", "embeddings.weight[V,D]"),
        Row("decoder.final_norm.weight", "norm_f.weight[D]"),
        Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
    ),
    aliases=frozenset(("num_local_experts", "layer_types")),
    predicts_further=True,
    runs_in_engine=False,
)
