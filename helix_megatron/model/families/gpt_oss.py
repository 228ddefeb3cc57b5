"""gpt-oss: sinks, windows in every second layer, yarn, and experts with biases and a clamped gate."""

from __future__ import annotations

from helix_megatron.model.families.configuration import RMS_NORM, SIZES, keys
from helix_megatron.model.families.experts import Experts
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import (
    Always,
    Config,
    Heads,
    Only,
    Tied,
    Unread,
    Values,
    Vocabulary,
)
from helix_megatron.model.families.positions import LayerWindows, Rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
LAYER = (
    *ATTENTION_LAYER,
    Row("self_attention.core_attention.softmax_offset", "self_attn.sinks[N]", when="sinks"),
    Row("mlp.router.weight", "mlp.router.weight[E,D]"),
    Row("mlp.router.bias", "mlp.router.bias[E]", when="bias"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "mlp.experts.gate_up_proj[E,D,2M]",
        "interleaved",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc1.bias",
        "mlp.experts.gate_up_proj_bias[E,2M]",
        "interleaved",
        "bias",
    ),
    Row("mlp.experts.{expert}.linear_fc2.weight", "mlp.experts.down_proj[E,M,D]", "transposed"),
    Row("mlp.experts.{expert}.linear_fc2.bias", "mlp.experts.down_proj_bias[E,D]", when="bias"),
)


def windowed(config: Config, layer: int) -> bool:
    """Every second layer, beginning with the first."""
    return layer % 2 == 0


FAMILY = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        SIZES,
        Vocabulary(),
        RMS_NORM,
        Heads(kv_heads=8, head_dim=64),
        Rope(theta=150000.0, default=YARN),
        LayerWindows(windowed, default=128, switch=False),
        keys(max_position_embeddings=131072, norm_epsilon=1e-5),
        Tied(False),
        Experts(
            number=("num_local_experts", "num_experts"),
            size="intermediate_size",
            default_number=128,
            default_topk=4,
            dense_layers=False,
        ),
        Values(swiglu_limit=("activation_func_clamp_value", 7.0)),
        Unread("experts_per_token", "initial_context_length"),  # said by other keys, too
        Only(attention_bias=(True,), hidden_act=("silu",), swiglu_alpha=(1.702,)),
        Always(
            disable_bias_linear=False,
            add_qkv_bias=False,
            quick_geglu=True,
            glu_linear_offset=1.0,
            softmax_type="learnable",
        ),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
