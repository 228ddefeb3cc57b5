"""GPT-2: learned positions, LayerNorm, matrices stored as [in, out]."""

from __future__ import annotations

from helix_megatron.model.families.family import Family, Row
from helix_megatron.model.families.pieces import Activation, Always, Only, Tied, Values, Vocabulary

LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "ln_1.weight[D]"),
    Row("self_attention.linear_qkv.layer_norm_bias", "ln_1.bias[D]"),
    Row("self_attention.linear_qkv.weight", "attn.c_attn.weight[D,3D]", "fused-qkv-transposed"),
    Row("self_attention.linear_qkv.bias", "attn.c_attn.bias[3D]", "fused-qkv-transposed"),
    Row("self_attention.linear_proj.weight", "attn.c_proj.weight[D,D]", "transposed"),
    Row("self_attention.linear_proj.bias", "attn.c_proj.bias[D]"),
    Row("mlp.linear_fc1.layer_norm_weight", "ln_2.weight[D]"),
    Row("mlp.linear_fc1.layer_norm_bias", "ln_2.bias[D]"),
    Row("mlp.linear_fc1.weight", "mlp.c_fc.weight[D,F]", "transposed"),
    Row("mlp.linear_fc1.bias", "mlp.c_fc.bias[F]"),
    Row("mlp.linear_fc2.weight", "mlp.c_proj.weight[F,D]", "transposed"),
    Row("mlp.linear_fc2.bias", "mlp.c_proj.bias[D]"),
)
OUTER = (
    Row("embedding.word_embeddings.weight", "wte.weight[V,D]"),
    Row("embedding.position_embeddings.weight", "wpe.weight[P,D]"),
    Row("decoder.final_layernorm.weight", "ln_f.weight[D]"),
    Row("decoder.final_layernorm.bias", "ln_f.bias[D]"),
    Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
)

FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    layer="h",
    pieces=(
        Values(
            n_layer=("num_layers", ...),
            n_embd=("hidden_size", ...),
            n_head=("num_attention_heads", ...),
            n_inner=("ffn_hidden_size", None),
            n_positions=("max_position_embeddings", 1024),
            layer_norm_epsilon=("norm_epsilon", 1e-5),
            attn_pdrop=("attention_dropout", 0.1),
            resid_pdrop=("hidden_dropout", 0.1),
            embd_pdrop=("hidden_dropout", 0.1),
            initializer_range=("init_method_std", 0.02),
        ),
        Vocabulary(),
        Activation(
            "activation_function",
            "gelu_new",
            {
                "gelu_new": {"openai_gelu": True},
                "gelu_pytorch_tanh": {"openai_gelu": True},
                "gelu_fast": {"openai_gelu": True},
                "gelu": {"openai_gelu": False},
            },
        ),
        Tied(True),
        Always(
            position_embedding_type="learned_absolute",
            normalization="LayerNorm",
            apply_layernorm_1p=False,
            disable_bias_linear=False,
            group_query_attention=False,
        ),
        Only(
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,),
        ),
    ),
    rows=LAYER,
    outer=OUTER,
    modules=None,
    aliases=frozenset(
        ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    ),
)
