"""Tables of tensors that several families share.

Letters of shapes: V vocabulary, P positions, D hidden size, H dimensions of a head, N query heads, Q all
dimensions of them, K of all key-value heads, QKV of queries, keys and values, F MLP, E experts, M MLP of an
expert, S MLP of the shared expert; 2F, 2M and 3D are multiples.
"""

from __future__ import annotations

from helix_megatron.model.families.family import Row

ATTENTION_LAYER = (
    Row("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight[D]"),
    Row("self_attention.linear_qkv.layer_norm_bias", "input_layernorm.bias[D]", when="norm-bias"),
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
    Row("self_attention.q_layernorm.weight", "self_attn.q_norm.weight[Q]", when="flat-norm"),
    Row("self_attention.k_layernorm.weight", "self_attn.k_norm.weight[K]", when="flat-norm"),
    Row("self_attention.linear_proj.weight", "self_attn.o_proj.weight[D,Q]"),
    Row("self_attention.linear_proj.bias", "self_attn.o_proj.bias[D]", when="bias"),
    Row("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight[D]"),
    Row("mlp.linear_fc1.layer_norm_bias", "post_attention_layernorm.bias[D]", when="norm-bias"),
)
BEHIND_LAYER = tuple(row for row in ATTENTION_LAYER if "layer_norm_" not in row.name)
BEHIND_NORMS = (
    Row("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight[D]"),
    Row("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight[D]"),
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
BALANCED_EXPERTS = (
    *(row for row in QWEN_EXPERTS if "shared" not in row.when),
    Row("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias[E]", when="expert-bias"),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_experts.gate_proj.weight[S,D] mlp.shared_experts.up_proj.weight[S,D]",
        "stacked",
        when="shared",
    ),
    Row(
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_experts.down_proj.weight[D,S]",
        when="shared",
    ),
)
LLAMA_OUTER = (
    Row("embedding.word_embeddings.weight", "embed_tokens.weight[V,D]"),
    Row("decoder.final_layernorm.weight", "norm.weight[D]"),
    Row("decoder.final_layernorm.bias", "norm.bias[D]", when="norm-bias"),
    Row("output_layer.weight", "lm_head.weight[V,D]", when="untied"),
)
