"""GLM-4: norms before and behind attention and MLP, and half of every head rotated, neighbours as pairs."""

from __future__ import annotations

from helix_megatron.model.families.configuration import LLAMA_LIKE, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import Always, Heads, Tied, Values
from helix_megatron.model.families.positions import Rope
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

LAYER = (
    *ATTENTION_LAYER,
    Row("self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm.weight[D]"),
    Row("mlp.linear_fc1.weight", "mlp.gate_up_proj.weight[2F,D]"),
    Row("mlp.linear_fc2.weight", "mlp.down_proj.weight[D,F]"),
    Row("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm.weight[D]"),
)

FAMILY = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        *LLAMA_LIKE,
        Heads(kv_heads=2, head_dim=128),
        Rope(partial=0.5, interleaved=True),
        keys(max_position_embeddings=131072, norm_epsilon=1.5625e-07),
        Tied(False),
        Always(disable_bias_linear=True, post_norms=True),
        Values(attention_bias=("add_qkv_bias", True)),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
