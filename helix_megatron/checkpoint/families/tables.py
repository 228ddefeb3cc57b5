"""The families: for each a table of `config.json` and one of tensors.

Sources: the configuration and model classes of the `transformers` package (their defaults are the defaults
here) and the names that its `save_pretrained` writes. To add a family, add one entry: pieces for every key
that decides what the model computes, and rows for its tensors (most share `LLAMA_LAYER`).

Letters of shapes: V vocabulary, P positions, D hidden size, H dimensions of a head, Q all query heads,
K all key-value heads, F MLP, E experts, M MLP of an expert, S MLP of the shared expert.
"""

from __future__ import annotations

from helix_megatron.checkpoint.families.experts import Experts
from helix_megatron.checkpoint.families.family import Family, Row
from helix_megatron.checkpoint.families.pieces import (
    Activation,
    Always,
    EmbeddingScale,
    Heads,
    LinearBiases,
    Only,
    Tied,
    Values,
    Vocabulary,
)
from helix_megatron.checkpoint.families.positions import LayerWindows, Rope, Window

ATTENTION_LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight[D]"),
    Row(
        "self_attention.linear_qkv.weight",
        "self_attn.q_proj.weight[Q,D] self_attn.k_proj.weight[K,D] self_attn.v_proj.weight[K,D]",
        "qkv",
    ),
    Row(
        "self_attention.linear_qkv.bias",
        "self_attn.q_proj.bias[Q] self_attn.k_proj.bias[K] self_attn.v_proj.bias[K]",
        "qkv",
        when="qkv-bias",
    ),
    Row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight[H]", when="qk-norm"),
    Row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight[H]", when="qk-norm"),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight[D,Q]"),
    Row("self_attention.linear_proj.bias", "self_attn.o_proj.bias[D]", when="bias"),
    Row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight[D]"),
)
GATED_MLP = (
    Row(
        "mlp.linear_fc1.weight",
        "mlp.gate_proj.weight[F,D] mlp.up_proj.weight[F,D]",
        "stacked",
        when="dense",
    ),
    Row(
        "mlp.linear_fc1.bias",
        "mlp.gate_proj.bias[F] mlp.up_proj.bias[F]",
        "stacked",
        when="dense bias",
    ),
    Row("mlp.linear_fc2.weight", "mlp.down_proj.weight[D,F]", when="dense"),
    Row("mlp.linear_fc2.bias", "mlp.down_proj.bias[D]", when="dense bias"),
)
LLAMA_LAYER = ATTENTION_LAYER + GATED_MLP
QWEN_EXPERTS = (
    Row("mlp.router.weight", "mlp.gate.weight[E,D]", when="experts"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "mlp.experts.{expert}.gate_proj.weight[M,D] mlp.experts.{expert}.up_proj.weight[M,D]",
        "stacked",
        when="experts",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc2.weight",
        "mlp.experts.{expert}.down_proj.weight[D,M]",
        when="experts",
    ),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.gate_proj.weight[S,D] mlp.shared_expert.up_proj.weight[S,D]",
        "stacked",
        when="shared",
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_expert.down_proj.weight[D,S]",
        when="shared",
    ),
    Row("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight[1,D]", when="shared-gate"),
)
MIXTRAL_EXPERTS = (
    Row("mlp.router.weight", "block_sparse_moe.gate.weight[E,D]"),
    Row(
        "mlp.experts.{expert}.linear_fc1.weight",
        "block_sparse_moe.experts.{expert}.w1.weight[M,D] "
        "block_sparse_moe.experts.{expert}.w3.weight[M,D]",
        "stacked",
    ),
    Row(
        "mlp.experts.{expert}.linear_fc2.weight",
        "block_sparse_moe.experts.{expert}.w2.weight[D,M]",
    ),
)
LLAMA_OUTER = (
    Row("embedding.word_embeddings.weight", "embed_tokens.weight[V,D]"),
    Row("decoder.final_layernorm.weight", "norm.weight[D]"),
    Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
)
GPT2_LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "ln_1.weight[D]"),
    Row("self_attention.linear_qkv.layer_norm_bias", "ln_1.bias[D]"),
    Row("self_attention.linear_qkv.weight", "attn.c_attn.weight[D,3D]", "fused-qkv"),
    Row("self_attention.linear_qkv.bias", "attn.c_attn.bias[3D]", "fused-qkv"),
    Row("self_attention.linear_proj.weight", "attn.c_proj.weight[D,D]", "transposed"),
    Row("self_attention.linear_proj.bias", "attn.c_proj.bias[D]"),
    Row("mlp.linear_fc1.layer_norm_weight", "ln_2.weight[D]"),
    Row("mlp.linear_fc1.layer_norm_bias", "ln_2.bias[D]"),
    Row("mlp.linear_fc1.weight", "mlp.c_fc.weight[D,F]", "transposed"),
    Row("mlp.linear_fc1.bias", "mlp.c_fc.bias[F]"),
    Row("mlp.linear_fc2.weight", "mlp.c_proj.weight[F,D]", "transposed"),
    Row("mlp.linear_fc2.bias", "mlp.c_proj.bias[D]"),
)
GPT2_OUTER = (
    Row("embedding.word_embeddings.weight", "wte.weight[V,D]"),
    Row("embedding.position_embeddings.weight", "wpe.weight[P,D]"),
    Row("decoder.final_layernorm.weight", "ln_f.weight[D]"),
    Row("decoder.final_layernorm.bias", "ln_f.bias[D]"),
    Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
)

SIZES = Values(
    num_hidden_layers=("num_layers", ...),
    hidden_size=("hidden_size", ...),
    attention_dropout=("attention_dropout", 0.0),
    initializer_range=("init_method_std", 0.02),
)
DENSE_SIZE = Values(intermediate_size=("ffn_hidden_size", ...))
NO_BIASES = Always(disable_bias_linear=True, add_qkv_bias=False)
QKV_BIASES = Always(disable_bias_linear=True, add_qkv_bias=True)
RMS_NORM = Always(normalization="RMSNorm", apply_layernorm_1p=False)
QK_NORM = Always(qk_layernorm=True)
SILU = Activation("hidden_act", "silu", {"silu": {"swiglu": True}, "swish": {"swiglu": True}})


def _positions(default: int) -> Values:
    return Values(max_position_embeddings=("max_position_embeddings", default))


def _epsilon(default: float) -> Values:
    return Values(rms_norm_eps=("norm_epsilon", default))


LLAMA_LIKE = (SIZES, DENSE_SIZE, Vocabulary(), RMS_NORM, SILU)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(),
                Rope(),
                _positions(2048),
                _epsilon(1e-6),
                Tied(False),
                LinearBiases(),
            ),
            LLAMA_LAYER,
            LLAMA_OUTER,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(kv_heads=8),
                Rope(),
                Window(default=4096),
                _positions(131072),
                _epsilon(1e-6),
                Tied(False),
                NO_BIASES,
            ),
            LLAMA_LAYER,
            LLAMA_OUTER,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(kv_heads=32),
                Rope(),
                LayerWindows(),
                _positions(32768),
                _epsilon(1e-6),
                Tied(False),
                QKV_BIASES,
            ),
            LLAMA_LAYER,
            LLAMA_OUTER,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(kv_heads=32, head_dim=128),
                Rope(),
                LayerWindows(),
                _positions(32768),
                _epsilon(1e-6),
                Tied(False),
                NO_BIASES,
                Only(attention_bias=(False,)),
                QK_NORM,
            ),
            LLAMA_LAYER,
            LLAMA_OUTER,
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            "model.",
            "layers",
            (
                SIZES,
                DENSE_SIZE,
                Vocabulary(),
                Always(normalization="RMSNorm", apply_layernorm_1p=True),
                # Early files say gelu and mean its tanh form; hidden_activation is their correction.
                Activation(
                    "hidden_act",
                    "gelu_pytorch_tanh",
                    {"gelu_pytorch_tanh": {"geglu": True}, "gelu": {"geglu": True}},
                ),
                Only(hidden_activation=(None, "gelu_pytorch_tanh")),
                Heads(kv_heads=16, head_dim=256),
                Rope(),
                EmbeddingScale(),
                _positions(8192),
                _epsilon(1e-6),
                Tied(True),
                NO_BIASES,
                Only(attention_bias=(False,), use_bidirectional_attention=(None, False)),
            ),
            LLAMA_LAYER,
            LLAMA_OUTER,
        ),
        Family(
            "gpt2",
            "GPT2LMHeadModel",
            "transformer.",
            "h",
            (
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
            GPT2_LAYER,
            GPT2_OUTER,
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "model.",
            "layers",
            (
                SIZES,
                Vocabulary(),
                RMS_NORM,
                SILU,
                Heads(kv_heads=8),
                Rope(theta=1e6),
                Window(),
                _positions(131072),
                _epsilon(1e-5),
                Tied(False),
                NO_BIASES,
                Experts(
                    number=("num_local_experts", "num_experts"),
                    size="intermediate_size",
                    default_number=8,
                    default_topk=2,
                    dense_layers=False,
                ),
                Only(router_jitter_noise=(0.0,)),
            ),
            ATTENTION_LAYER + MIXTRAL_EXPERTS,
            LLAMA_OUTER,
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(kv_heads=16),
                Rope(),
                LayerWindows(alternating=True),
                _positions(32768),
                _epsilon(1e-6),
                Tied(False),
                LinearBiases(qkv="qkv_bias", default=True),
                Experts(
                    number=("num_experts",),
                    size="moe_intermediate_size",
                    default_number=60,
                    default_topk=4,
                    shared_size=5632,
                ),
            ),
            LLAMA_LAYER + QWEN_EXPERTS,
            LLAMA_OUTER,
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "model.",
            "layers",
            (
                *LLAMA_LIKE,
                Heads(kv_heads=4),
                Rope(),
                Window(default=4096, switch=True),
                _positions(32768),
                _epsilon(1e-6),
                Tied(False),
                NO_BIASES,
                Only(attention_bias=(False,)),
                QK_NORM,
                Experts(
                    number=("num_local_experts", "num_experts"),
                    size="moe_intermediate_size",
                    default_number=128,
                    default_topk=8,
                ),
            ),
            LLAMA_LAYER + QWEN_EXPERTS,
            LLAMA_OUTER,
        ),
    )
}
