"""StarCoder2: LayerNorm, biases everywhere, an MLP without a gate."""

from __future__ import annotations

from helix_megatron.model.families.configuration import DENSE_SIZE, keys
from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import (
    Activation,
    AllBiases,
    Always,
    Heads,
    Tied,
    Unread,
    Values,
    Vocabulary,
)
from helix_megatron.model.families.positions import Rope, Window
from helix_megatron.model.families.tensors import ATTENTION_LAYER, LLAMA_OUTER

LAYER = (
    *ATTENTION_LAYER,
    Row("mlp.linear_fc1.weight", "mlp.c_fc.weight[F,D]"),
    Row("mlp.linear_fc1.bias", "mlp.c_fc.bias[F]", when="bias"),
    Row("mlp.linear_fc2.weight", "mlp.c_proj.weight[D,F]"),
    Row("mlp.linear_fc2.bias", "mlp.c_proj.bias[D]", when="bias"),
)

FAMILY = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    prefix="model.",
    layer="layers",
    pieces=(
        keys(num_layers=..., hidden_size=..., attention_dropout=0.0, init_method_std=0.018042),
        DENSE_SIZE,
        Vocabulary(),
        Always(normalization="LayerNorm", apply_layernorm_1p=False),
        Activation(
            "hidden_act",
            "gelu_pytorch_tanh",
            {"gelu_pytorch_tanh": {"openai_gelu": True}, "gelu": {"openai_gelu": False}},
        ),
        Heads(kv_heads=2),
        Unread("mlp_type"),
        Rope(),
        Window(),
        Values(
            max_position_embeddings=("max_position_embeddings", 4096),
            norm_epsilon=("norm_epsilon", 1e-5),
            residual_dropout=("hidden_dropout", 0.0),
            embedding_dropout=("hidden_dropout", 0.0),
        ),
        Tied(True),
        AllBiases(True),
    ),
    rows=LAYER,
    outer=LLAMA_OUTER,
)
