"""Llama 4, text: L2 norms, layers without rotary embedding, and one expert beside a shared one.

Two things are left out, and sequences kept so short that they change nothing: attention within chunks
(`attention_chunk_size`), and queries that grow with their position in layers without rotary embedding
(`attn_temperature_tuning`, from position `floor_scale` - 1 on). `max_position_embeddings` says how short.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families.configuration import NO_BIASES, RMS_NORM, SILU, SIZES, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import (
    Config,
    Heads,
    Only,
    Piece,
    Tied,
    Values,
    Vocabulary,
    needed,
)
from helix_megatron.model.families.positions import LayersWithoutRope, Rope, layers_with_rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

LAYER = (
    *ATTENTION_LAYER,
    Row(
        "mlp.linear_fc1.weight",
        "feed_forward.gate_proj.weight[F,D] feed_forward.up_proj.weight[F,D]",
        "stacked",
        when="dense",
    ),
    Row("mlp.linear_fc2.weight", "feed_forward.down_proj.weight[D,F]", when="dense"),
    Row("mlp.router.weight", "feed_forward.router.weight[E,D]", when="experts"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "feed_forward.experts.gate_up_proj[E,D,2M]",
        "transposed",
        when="experts",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc2.weight",
        "feed_forward.experts.down_proj[E,M,D]",
        "transposed",
        when="experts",
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "feed_forward.shared_expert.gate_proj.weight[S,D] feed_forward.shared_expert.up_proj.weight[S,D]",
        "stacked",
        when="shared",
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        "feed_forward.shared_expert.down_proj.weight[D,S]",
        when="shared",
    ),
)


class Positions(Piece):
    """The longest sequence, as far as neither chunks nor grown queries change anything."""

    keys = (
        "max_position_embeddings",
        "attention_chunk_size",
        "attn_temperature_tuning",
        "floor_scale",
        "attn_scale",
        "layer_types",
    )
    fields: ClassVar = {
        "max_position_embeddings": "max_position_embeddings",
        "attention_chunk_size": "max_position_embeddings",
        "floor_scale": "max_position_embeddings",
    }

    def flags(self, config: Config) -> dict[str, Any]:
        longest = needed(config, "max_position_embeddings", 131072)
        turned = layers_with_rope(config, 4)
        chunk, types = config.get("attention_chunk_size", 8192), config.get("layer_types")
        chunked = any(turned) if types is None else "chunked_attention" in types
        limits = [chunk] if chunk and chunked else []
        if config.get("attn_temperature_tuning", True) and not all(turned):
            limits.append(needed(config, "floor_scale", 8192) - 1)
        if limits and min(limits) < longest:
            if min(limits) < 1:
                raise HelixError(
                    f"config.json sets floor_scale = {config['floor_scale']}, and queries then grow from the "
                    "first position on, which Megatron's GPT cannot compute. Valid: 2 and more."
                )
            warnings.warn(
                "attention_chunk_size and attn_temperature_tuning change what this model computes for "
                f"sequences of more than {min(limits)} tokens. Megatron's GPT has neither, "
                f"so that is the longest sequence here (max_position_embeddings in config.json: {longest}).",
                stacklevel=4,
            )
        return {"max_position_embeddings": min([longest, *limits])}

    def config(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "max_position_embeddings": model.max_position_embeddings,
            "attention_chunk_size": None,
            "attn_temperature_tuning": False,
        }


@dataclass(frozen=True)
class OneExpert(Piece):
    """One expert of a token, weighted by a sigmoid before it, in the layers that `moe_layers` lists."""

    keys: tuple[str, ...] = (
        "num_local_experts",
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_layers",
        "interleave_moe_layer_step",
    )
    fields: ClassVar = {
        "num_local_experts": "num_experts",
        "intermediate_size": "moe_ffn_hidden_size",
        "intermediate_size_mlp": "ffn_hidden_size",
        "interleave_moe_layer_step": "num_layers",
    }

    def flags(self, config: Config) -> dict[str, Any]:
        layers, size = needed(config, "num_hidden_layers"), needed(config, "intermediate_size")
        step, chosen = needed(config, "interleave_moe_layer_step", 1), config.get("moe_layers")
        if chosen is None:
            chosen = list(range(step - 1, layers, step))
        if not isinstance(chosen, list) or not all(layer in range(layers) for layer in chosen):
            raise HelixError(
                f"config.json sets moe_layers = {chosen!r:.80}. It must be a list of numbers of its {layers} "
                "layers."
            )
        return {
            "num_experts": needed(config, "num_local_experts", 16),
            "moe_ffn_hidden_size": size,
            "moe_shared_expert_intermediate_size": size,
            "moe_shared_expert_gate": False,
            "ffn_hidden_size": needed(config, "intermediate_size_mlp", 16384),
            "moe_layer_freq": [int(layer in chosen) for layer in range(layers)],
            "moe_router_topk": 1,
            "moe_router_score_function": "sigmoid",
            "moe_apply_probs_on_input": True,
        }

    def config(self, model: ModelConfig) -> dict[str, Any]:
        if model.num_experts is None:  # a dense model: valid, and then found to differ from it
            model = dataclasses.replace(model, num_experts=16)
        return {
            "num_local_experts": model.num_experts,
            "intermediate_size": model.moe_ffn_hidden_size,
            "intermediate_size_mlp": model.ffn_hidden_size,
            "moe_layers": [layer for layer, experts in enumerate(model.moe_layers) if experts],
        }


FAMILY = Family(
    name="llama4_text",
    architecture="Llama4ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        Vocabulary(),
        RMS_NORM,
        SILU,
        Heads(kv_heads=8, head_dim=128),
        Rope(theta=500000.0, interleaved=True),
        LayersWithoutRope(),
        Positions(),
        keys(norm_epsilon=1e-5),
        Values(use_qk_norm=("qk_l2_norm", True)),
        Tied(False),
        NO_BIASES,
        OneExpert(),
        Only(num_experts_per_tok=(1,), router_jitter_noise=(0.0,), attention_bias=(False,)),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
