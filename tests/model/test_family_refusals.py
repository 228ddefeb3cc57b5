"""What conversion refuses, and with which words; what it shortens, with a warning."""

from __future__ import annotations

import pytest
from hf_models import config_of
from tiny_checkpoints import run_of

from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.forms import SHOWN
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.families import FAMILIES, INEXPRESSIBLE, family_of

UNSUPPORTED = {
    "yarn that grows otherwise": (
        "llama 2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
        "attention_factor = 1.0 of yarn rotary embedding. Megatron's GPT has what follows from factor, mscale "
        "and mscale_all_dim only, here 1.1386",
    ),
    "longrope": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rotary embedding of type 'longrope'",
    ),
    "no biases of gpt-oss": ("gpt oss", {"attention_bias": False}, "attention_bias = False"),
    "another gate of gpt-oss": ("gpt oss", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
    "sigmoids that are not normalised": (
        "glm4 moe",
        {"norm_topk_prob": False},
        "norm_topk_prob = False and num_experts_per_tok = 2",
    ),
    "groups by three experts": (
        "glm4 moe",
        {"num_experts_per_tok": 3, "topk_group": 1},
        "topk_group = 1 and num_experts_per_tok = 3. Megatron's router counts a group by its 3 best",
    ),
    "two experts of Llama 4": ("llama4", {"num_experts_per_tok": 2}, "num_experts_per_tok = 2"),
    "layers without rope": ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers = [1]"),
    "dynamic": (
        "llama 2",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "type 'dynamic' (rope_parameters or rope_scaling), which Megatron's GPT does not have. Valid: "
        "default, linear, llama3, yarn.",
    ),
    "other llama3 constants": (
        "llama 3",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 2.0,
            }
        },
        "low_freq_factor = 2.0 of llama3 rotary embedding. Megatron's GPT has 1.0 only.",
    ),
    "a theta below one": (
        "llama 2",
        {"rope_parameters": {"rope_theta": 0.5}},
        "rope_theta = 0.5. It must be a finite number of at least 1.",
    ),
    "partial rotary": (
        "llama 2",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "unknown rotary key": (
        "llama 2",
        {"rope_parameters": {"rope_theta": 1e4, "beta_fast": 32}},
        "beta_fast",
    ),
    "unknown activation": (
        "llama 2",
        {"hidden_act": "relu"},
        "hidden_act = 'relu', which Megatron's GPT does not have in this family. Valid: silu, swish.",
    ),
    "attention biases alone": (
        "llama 2",
        {"attention_bias": True},
        "attention_bias = True and mlp_bias = False",
    ),
    "biases of Qwen 3": ("qwen3", {"attention_bias": True}, "attention_bias = True"),
    "quantized": (
        "mistral",
        {"quantization_config": {"bits": 4}},
        "quantized by None (quantization_config), which cannot be read. Valid: fp8, mxfp4",
    ),
    "part of a head": ("llama 2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "second names": (
        "gpt2",
        {"hidden_size": 64},
        "hidden_size = 64, which gpt2 models do not have",
    ),
    "rotary embedding of Phi-3.5 and Phi-4-mini": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "long_factor": [1.1], "short_factor": [1.0]}},
        "rotary embedding of type 'longrope'",
    ),
    "both directions": (
        "gemma",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention = True, which Megatron's GPT cannot compute",
    ),
    "scale by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx = True",
    ),
    "two dropouts": (
        "gpt2",
        {"embd_pdrop": 0.0},
        "resid_pdrop = 0.1 and embd_pdrop = 0.0, and Megatron has one setting for both, --hidden-dropout",
    ),
    "heads": ("qwen2", {"num_key_value_heads": 3}, "num_key_value_heads = 3"),
    "one expert": (
        "mixtral",
        {"num_experts_per_tok": 1},
        "num_experts_per_tok = 1 with normalised weights",
    ),
    "router noise": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    "no experts": ("qwen3 moe", {"mlp_only_layers": [0, 1]}, "gives experts to none of 2 layers"),
    "experts 0": ("qwen2 moe", {"num_experts": 0}, "num_experts = 0"),
    "layer types": (
        "qwen2",
        {"layer_types": ["full_attention", "chunked_attention"]},
        "chunked_attention",
    ),
    "layers that are neither": (
        "qwen3 next",
        {"layer_types": ["linear_attention", "sliding_attention"]},
        "It must be a list with one of full_attention, linear_attention for each.",
    ),
    "groups that are chosen in another way": (
        "deepseek v2",
        {"topk_method": "noaux_tc"},
        "topk_method = 'noaux_tc'",
    ),
    "groups without as many experts": (
        "deepseek v2 with groups",
        {"num_experts_per_tok": 3},
        "of moe_router_group_topk 1 of moe_router_num_groups 4 groups of the 8",
    ),
    "weights that transformers does not normalise": (
        "deepseek v2",
        {"norm_topk_prob": True},
        "norm_topk_prob = True",
    ),
    "keys and values of fewer heads, with latents": (
        "deepseek v3",
        {"num_key_value_heads": 2},
        "num_key_value_heads = 2 and num_attention_heads = 4",
    ),
    "biases of latents": ("deepseek v3", {"attention_bias": True}, "attention_bias = True"),
    "other rotary pairs": ("deepseek v3", {"rope_interleave": False}, "rope_interleave = False"),
    "latents with scaled positions": (
        "deepseek v3",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type default and yarn only",
    ),
    "a scale of scores that rotation does not have": (
        "deepseek v3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}},
        "mscale_all_dim = 1.0",
    ),
    "a range that is not rounded": (
        "deepseek v3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate = false",
    ),
    "layers of another kind": (
        "nemotron h",
        {"layers_block_type": ["mamba", "convolution"]},
        "It must have a list with one of linear_attention, full_attention, moe, mlp for each",
    ),
    "another epsilon than Mamba's": (
        "nemotron h",
        {"layer_norm_epsilon": 1e-6},
        "layer_norm_epsilon = 1e-06",
    ),
    "a longer convolution": ("nemotron h", {"conv_kernel": 5}, "conv_kernel = 5"),
    "keys under their older names": ("nemotron h", {"mamba_n_groups": 2}, "mamba_n_groups = 2"),
    "another epsilon than Mamba's, beside MLPs": (
        "granite 4",
        {"rms_norm_eps": 1e-6},
        "rms_norm_eps = 1e-06, and the norm inside of Megatron's Mamba layers has 1e-05",
    ),
    "layers of a third kind": (
        "granite 4",
        {"layer_types": ["mamba", "attention", "moe"]},
        "It must be a list with one of mamba, attention, linear_attention, full_attention for each",
    ),
    "another number of layers": ("granite 4", {"layer_types": ["mamba"]}, "for 3 layers"),
    "Mamba heads of another size together": (
        "bamba",
        {"mamba_d_head": 4},
        "are 32 dimensions, and mamba_expand = 2 times hidden_size = 32 are 64",
    ),
    "limited time steps": (
        "bamba",
        {"time_step_limit": [0.1, 1.0]},
        "time_step_limit = [0.1, 1.0]",
    ),
    "layers by name": ("bamba", {"attn_layer_indices": ["1"]}, "['1']. It must be a list of whole"),
    "tokens without experts": ("granite 4", {"num_experts_per_tok": 0}, "tok = 0. It must be"),
    "windows without a size": (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 2},
        "use_sliding_window is not set or sliding_window is missing",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_cannot_be_expressed_is_refused(case):
    """Ignored silently, each of these would give a model that computes something else."""
    name, changed, text = UNSUPPORTED[case]
    config = config_of(name) | changed
    with pytest.raises(HelixError) as error:
        family_of(config).model_flags(config)
    assert text in str(error.value)


def test_what_cannot_be_converted_is_named():
    """A type that Hugging Face's host cuts converts, or is refused for what is in the way."""
    with pytest.raises(
        HelixError,
        match=r"gemma4 have heads of two sizes .*global_head_dim.*, which conversion cannot",
    ):
        family_of({"model_type": "gemma4"})
    assert not INEXPRESSIBLE.keys() & FAMILIES.keys()
    assert {*INEXPRESSIBLE, *FAMILIES} >= SHOWN


def test_llama_4_is_converted_for_the_sequences_that_megatron_computes():
    """Chunks and grown queries change nothing before their first border."""
    config = config_of("llama4") | {"attention_chunk_size": 32, "floor_scale": 30}
    family = family_of(config)
    with pytest.warns(UserWarning, match=r"more than 29 tokens.*config.json: 64"):
        flags = family.model_flags(config)
    assert flags["max_position_embeddings"] == 29
    with pytest.warns(UserWarning, match="29 tokens"):
        assert family.config(flags, config) == config
    with pytest.raises(HelixError, match=r"floor_scale = 1, and queries then grow"):
        family.model_flags(config | {"floor_scale": 1})


LINEAR = {
    "num_layers": 2,
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "linear_attention_freq": 2,
    "linear_num_key_heads": 2,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        ({"tensor_model_parallel_size": 4, "intra_head_parallel_size": 2}, "2 key heads cannot"),
        ({"context_parallel_size": 2}, "needs the whole of one sequence"),
    ],
)
def test_layouts_that_gated_delta_nets_cannot_have(parallel, text):
    """megatron-core would fail in an assertion, or compute something else."""
    with pytest.raises(HelixError, match=text):
        run_of(LINEAR, world_size=4, **parallel)


LATENT = {name: LINEAR[name] for name in LINEAR if not name.startswith("linear")} | {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_pos_emb_head_dim": 8,
}


HYBRID = {name: LINEAR[name] for name in LINEAR if not name.startswith("linear")} | {
    "hybrid_layer_pattern": "M*",
    "mamba_num_heads": 4,
    "mamba_num_groups": 2,
}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (LINEAR, "gated delta nets"),
        (LATENT, "latent attention"),
        (HYBRID, "layers of several kinds"),
    ],
)
def test_what_has_no_files_per_rank(flags, text):
    """Nothing here deals their parts to ranks but megatron-core."""
    with pytest.raises(HelixError, match=rf"{text} .* no files per rank"):
        RankLayout(flags)


@pytest.mark.parametrize(
    ("flags", "parallel", "text"),
    [
        (
            {},
            {"tensor_model_parallel_size": 4, "intra_head_parallel_size": 2},
            "no key-value heads",
        ),
        ({}, {"context_parallel_size": 2}, "needs the whole of one sequence"),
        ({"q_lora_rank": 6}, {"tensor_model_parallel_size": 4}, "are 6 dimensions, .*: 1, 2, 3, 6"),
        ({"kv_lora_rank": 18}, {"tensor_model_parallel_size": 4}, "are 26 dimensions"),
    ],
)
def test_layouts_that_latent_attention_cannot_have(flags, parallel, text):
    """megatron-core would fail in an assertion."""
    with pytest.raises(HelixError, match=text):
        run_of(LATENT | flags, world_size=4, **parallel)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"qk_layernorm": False}, "qk_layernorm is False, .* only True"),
        ({"window_size": 4}, "window_size is 4, .* only None"),
        ({"group_query_attention": True}, "group_query_attention is True, .* only False"),
        ({"kv_channels": 8}, "kv_channels is 8, .* only 128"),
        ({"position_embedding_type": "yarn"}, "round_to_int is False, .* only True"),
        ({"position_embedding_type": "none"}, "8 with position_embedding_type none"),
        ({"qk_pos_emb_head_dim": 7}, "and that is 7"),
    ],
)
def test_latent_attention_that_megatron_does_not_have(changed, text):
    """Its layers read none of these settings."""
    with pytest.raises(HelixError, match=text):
        ModelConfig.from_flags(LATENT | changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"linear_num_value_heads": 3}, "3 is no multiple of"),
        ({"disable_bias_linear": False}, "is for models with"),
        ({"linear_attention_freq": 1}, "gives no layer a gated delta net"),
    ],
)
def test_gated_delta_nets_that_megatron_does_not_have(changed, text):
    """Refused when the model is described, not inside a layer."""
    with pytest.raises(HelixError, match=text):
        ModelConfig.from_flags(LINEAR | changed)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"hybrid_layer_pattern": "M+"}, r"'M\+' has \+. Valid letters: \*, M, -, E"),
        ({"hybrid_layer_pattern": "M*-"}, "has 3 letters, and num_layers is 2"),
        ({"hybrid_layer_pattern": "ME"}, r"has 1 layer of experts \(E\), and num_experts is None"),
        ({"normalization": "LayerNorm"}, "is for models with normalization RMSNorm"),
        ({"hidden_dropout": 0.1}, "hidden_dropout is 0.1, and layers of a hybrid"),
        (
            {"qk_layernorm": True, "qk_norm_behind_rotary": True},
            "qk_norm_behind_rotary is True, and layers of a hybrid",
        ),
        (
            {"hybrid_layer_pattern": None, "num_experts": 2, "moe_latent_size": 8},
            "moe_latent_size is of experts without biases in layers of a hybrid",
        ),
        ({"mamba_num_heads": 3}, "mamba_num_heads 3 is no multiple of mamba_num_groups 2"),
    ],
)
def test_patterns_that_megatron_does_not_have(changed, text):
    """Refused when the model is described; ignored, some of these would give another model."""
    with pytest.raises(HelixError, match=text):
        ModelConfig.from_flags(HYBRID | changed)


@pytest.mark.parametrize(
    ("parallel", "text"),
    [
        (
            {"tensor_model_parallel_size": 4, "intra_head_parallel_size": 2},
            "cannot be dealt to 4 t",
        ),
        ({"context_parallel_size": 2}, "needs the whole of one sequence"),
        (
            {"pipeline_model_parallel_size": 2, "global_batch_size": 64}
            | {"num_layers_per_virtual_pipeline_stage": 1},
            "does not interleave",
        ),
    ],
)
def test_layouts_that_patterns_cannot_have(parallel, text):
    """megatron-core would fail in an assertion, or compute something else."""
    with pytest.raises(HelixError, match=text):
        run_of(HYBRID | {"num_layers": 4, "hybrid_layer_pattern": "M*M-"}, world_size=4, **parallel)
