"""What describes a model: one field for each of Megatron's flags for models, under the flag's name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from helix_megatron.flags import add_flags, names_with, setting, whole_or_real
from helix_megatron.model.expert_fields import FUNCTION, MIXTURE, TRAINING, ExpertFields
from helix_megatron.model.patterns import layer_pattern

MODEL = "model"  # the group of the flags here


def _function(default: Any, help_text: str, **facts: Any) -> Any:
    return setting(default, help_text, **{"decides": FUNCTION, "group": MODEL} | facts)


def _yarn(default: Any, help_text: str, **facts: Any) -> Any:
    return _function(default, f"yarn: {help_text}", **{"under": "yarn", "yarn": True} | facts)


def _linear(default: Any, help_text: str, **facts: Any) -> Any:
    own = {"under": "linear attention", "megatron": True, "largest": 10**5}
    return _function(default, f"gated delta nets: {help_text}", **own | facts)


def _mamba(default: Any, help_text: str, **facts: Any) -> Any:
    own = {"under": "mamba", "megatron": True, "largest": 10**5}
    return _function(default, f"Mamba layers: {help_text}", **own | facts)


def _latent(default: Any, help_text: str, **facts: Any) -> Any:
    own = {"under": "latent attention", "latent": True, "largest": 10**5}
    return _function(default, f"latent attention: {help_text}", **own | facts)


def _other(default: Any, help_text: str, **facts: Any) -> Any:
    return setting(default, help_text, **{"group": MODEL} | facts)


@dataclass(frozen=True)
class ModelFields(ExpertFields):
    """The fields of `description.ModelConfig`, and nothing else.

    Metadata beside what `flags.setting` knows:

    - `decides`: `FUNCTION`, `TRAINING` or nothing;
    - `under`: what a model must have for the field to matter (`description.ModelConfig.traits`);
    - `megatron`: the field of TransformerConfig with this value, by name, or True for the same name;
    - `gpt`: the same for the arguments of GPTModel;
    - `config`: the usual key in a config.json of Hugging Face;
    - `inference`: False where the field means nothing for inference.
    """

    num_layers: int = _function(
        4, "number of transformer layers", megatron=True, config="num_hidden_layers", largest=10_000
    )
    hidden_size: int = _function(
        128, "hidden size", megatron=True, config="hidden_size", largest=10**7
    )
    ffn_hidden_size: int | None = _function(
        None,
        "MLP hidden size; 4 times the hidden size when not given",
        megatron=True,
        config="intermediate_size",
        largest=10**8,
    )
    num_attention_heads: int = _function(2, "number of query heads", megatron=True, largest=10**5)
    group_query_attention: bool = _other(False, "use --num-query-groups key-value heads")
    num_query_groups: int = _function(
        1, "number of key-value heads, with --group-query-attention", megatron=True, largest=10**5
    )
    kv_channels: int | None = _function(
        None,
        "dimensions of a head; hidden size over heads when not given",
        megatron=True,
        largest=10**5,
    )
    seq_length: int = _other(128, "tokens of a sample", decides=TRAINING, inference=False)
    max_position_embeddings: int | None = _function(
        None,
        "longest sequence; the tokens of a sample when not given",
        gpt="max_sequence_length",
        config="max_position_embeddings",
        largest=10**12,
    )
    position_embedding_type: str = _function(
        "rope",
        "position embedding",
        choices=("rope", "yarn", "learned_absolute", "none"),
        gpt=True,
    )
    rotary_base: float = _function(
        10000,
        "base period of rotary embedding",
        at_least=1,
        parse=whole_or_real,
        under="rope",
        gpt=True,
        largest=10**15,
    )
    rotary_base_windowed: float | None = _function(
        None,
        "base period, without scaling, in layers with a sliding window; as in other layers when not given",
        parse=whole_or_real,
        under="rope",
        largest=10**15,
    )
    rotary_percent: float = _function(
        1.0,
        "share of a head's dimensions that is rotated",
        above=0,
        at_most=1,
        under="rope",
        gpt=True,
    )
    rotary_interleaved: bool = _function(
        False, "rotate pairs (2k, 2k+1) instead of (k, k + d/2)", under="rope", megatron=True
    )
    rotary_seq_len_interpolation_factor: float | None = _function(
        None,
        "divide positions by this before rotation (linear scaling of rotary embedding)",
        above=0,
        under="rope",
        gpt="seq_len_interpolation_factor",
    )
    use_rope_scaling: bool = _function(
        False,
        "scale rotary frequencies as Llama 3.1 and later do",
        under="rope",
        gpt="rope_scaling",
    )
    rope_scaling_factor: float = _function(
        8.0,
        "factor of the lowest frequencies, with --use-rope-scaling",
        above=0,
        under="rope scaling",
        gpt=True,
    )
    rope_high_freq_factor: float = _function(
        4.0,
        "frequencies of more than this many turns in 8192 positions are not scaled, with --use-rope-scaling",
        above=0,
        under="rope scaling",
    )
    yarn_rotary_scaling_factor: float = _yarn(
        1.0, "how much longer sequences are than before yarn", above=0
    )
    yarn_original_max_position_embeddings: int = _yarn(
        4096, "longest sequence before yarn", largest=10**12
    )
    yarn_beta_fast: float = _yarn(
        32.0,
        "pairs that turn more often than this within that length keep their frequency",
        above=0,
    )
    yarn_beta_slow: float = _yarn(
        1.0, "pairs that turn less often than this are slowed by the whole factor", above=0
    )
    yarn_mscale: float = _yarn(1.0, "queries and keys grow by (0.1·this·ln(factor) + 1) …")
    yarn_mscale_all_dim: float = _yarn(0.0, "… divided by (0.1·this·ln(factor) + 1)")
    yarn_correction_range_round_to_int: bool = _yarn(
        False, "round the range of pairs between fast and slow to whole numbers"
    )
    no_rope_freq: int | tuple[int, ...] | None = _function(
        None,
        "every n-th layer has no rotary embedding; or a list with 1 for each that has none, such as [0,0,1]",
        parse=layer_pattern,
        under="rope",
    )
    embedding_multiplier: float = _function(
        1.0,
        "multiply word embeddings by this, rounded to their dtype (Gemma: square root of the hidden size)",
        above=0,
    )
    residual_multiplier: float = _function(
        1.0,
        "multiply what attention and MLP add to the hidden states by this, as Granite does",
        above=0,
    )
    logits_scaling: float = _function(1.0, "divide logits by this, as Granite does", above=0)
    final_logit_softcapping: float | None = _function(
        None, "bound logits by c·tanh(logit / c) with this c, as Gemma 2 does", above=0
    )
    attn_logit_softcapping: float | None = _function(
        None, "bound attention scores by c·tanh(score / c) with this c, as Gemma 2 does", above=0
    )
    normalization: str = _function(
        "LayerNorm", "norm of the hidden states", choices=("LayerNorm", "RMSNorm"), megatron=True
    )
    norm_epsilon: float = _function(
        1e-5, "epsilon of the norms", above=0, megatron="layernorm_epsilon", config="rms_norm_eps"
    )
    post_norms: bool = _function(
        False, "normalise what attention and MLP add to the hidden states, as Gemma 3 does"
    )
    no_pre_norms: bool = _function(
        False, "no norms before attention and MLP beside --post-norms, as EXAONE 4 has it"
    )
    apply_layernorm_1p: bool = _function(
        False,
        "store weights of norms minus 1, as Gemma does",
        megatron="layernorm_zero_centered_gamma",
    )
    swiglu: bool = _function(False, "gated MLP with SiLU instead of GELU")
    geglu: bool = _function(False, "gated MLP with tanh-approximated GELU, as Gemma has")
    openai_gelu: bool = _function(
        False, "tanh-approximated GELU, as GPT-2 has, instead of the exact one"
    )
    squared_relu: bool = _function(False, "MLP with the square of ReLU, as Nemotron has")
    quick_geglu: bool = _function(
        False, "gated MLP with x·sigmoid(1.702·x) as its activation, as gpt-oss has"
    )
    activation_func_clamp_value: float | None = _function(
        None,
        "gated MLP: gate at most this, the other half between minus this and this",
        above=0,
        megatron=True,
    )
    glu_linear_offset: float = _function(
        0.0, "gated MLP: added to the half that is no gate", megatron=True
    )
    disable_bias_linear: bool = _function(False, "no biases in linear layers")
    add_qkv_bias: bool = _function(
        False, "biases in linear_qkv even so", under="no biases", megatron=True
    )
    qk_layernorm: bool = _function(False, "normalise queries and keys of each head")
    qk_norm_all_heads: bool = _function(
        False,
        "with --qk-layernorm: one norm of all query heads and one of all key heads, as OLMo 2 has",
    )
    qk_norm_behind_rotary: bool = _function(
        False, "with --qk-layernorm: behind rotary embedding, as Hunyuan has it"
    )
    qk_l2_norm: bool = _function(
        False, "normalise queries and keys by their L2 norm, except in layers of --no-rope-freq"
    )
    attention_output_gate: bool = _function(False, "gate the attention output", megatron=True)
    softmax_scale: float | None = _function(
        None,
        "multiply attention scores by this; 1 over the root of a head's dimensions when not given",
        above=0,
        megatron=True,
    )
    softmax_type: str = _function(
        "vanilla",
        "softmax of attention scores: of the keys alone, with a sink of score 0 (off-by-one), or with a sink "
        "that each query head learns, as gpt-oss has",
        choices=("vanilla", "off-by-one", "learnable"),
        megatron=True,
    )
    window_size: int | None = _function(
        None, "sliding window: keys before the query that it sees", at_least=0, largest=10**12
    )
    window_attn_skip_freq: int | tuple[int, ...] | None = _function(
        None,
        "every n-th layer has no window; or a list with 1 for each layer that has, such as [0,1,1]",
        parse=layer_pattern,
    )
    linear_attention_freq: int | tuple[int, ...] | None = _function(
        None,
        "all layers but every n-th have a gated delta net instead of attention; or a list with 1 for each that "
        "has, such as [1,1,1,0]",
        parse=layer_pattern,
    )
    linear_num_key_heads: int = _linear(16, "heads of queries, and of keys")
    linear_num_value_heads: int = _linear(32, "heads of values, a multiple of those of keys")
    linear_key_head_dim: int = _linear(128, "dimensions of a head of queries, and of keys")
    linear_value_head_dim: int = _linear(128, "dimensions of a head of values")
    linear_conv_kernel_dim: int = _linear(4, "positions that the convolution before them sees")
    hybrid_layer_pattern: str | None = _function(
        None,
        "one letter for each layer, which is no more than that: * attention, M Mamba, - MLP, E experts",
    )
    mamba_num_heads: int = _mamba(128, "heads, a multiple of the groups")
    mamba_head_dim: int = _mamba(64, "dimensions of a head")
    mamba_state_dim: int = _mamba(128, "dimensions of the state of each of these")
    mamba_num_groups: int = _mamba(8, "groups of heads that share what enters and leaves the state")
    mamba_time_step_min: float = _function(
        0.0, "Mamba layers: a time step is at least this", at_least=0, under="mamba"
    )
    multi_latent_attention: bool = _function(
        False, "attention over one latent of all heads, as DeepSeek-V3 has it", latent=True
    )
    q_lora_rank: int | None = _latent(
        None,
        "dimensions of the queries' latent; queries come from the hidden states when not given",
    )
    kv_lora_rank: int = _latent(512, "dimensions of the latent of keys and values")
    qk_head_dim: int = _latent(128, "dimensions of queries and keys of a head that are not rotated")
    qk_pos_emb_head_dim: int = _latent(
        64, "dimensions of queries of a head, and of the one key of all heads, that are rotated"
    )
    v_head_dim: int = _latent(128, "dimensions of values of a head")
    latent_norm_epsilon: float | None = _function(
        None,
        "epsilon of the norms of latents; that of other norms when not given",
        above=0,
        under="latent attention",
    )
    untie_embeddings_and_output_weights: bool = _function(
        False, "an output layer with weights of its own"
    )
    attention_dropout: float = _other(
        0.0,
        "dropout of attention weights",
        below=1,
        decides=TRAINING,
        megatron=True,
        inference=False,
        config="attention_dropout",
    )
    hidden_dropout: float = _other(
        0.0, "dropout of hidden states", below=1, decides=TRAINING, megatron=True, inference=False
    )
    init_method_std: float = _other(
        0.02,
        "standard deviation of initial weights",
        decides=TRAINING,
        megatron=True,
        inference=False,
        config="initializer_range",
    )
    vocab_size: int | None = _other(
        None, "vocabulary; the tokenizer's when not given", largest=10**9
    )
    padded_vocab_size: int | None = _function(
        None, "rows of the word embedding", is_flag=False, gpt="vocab_size", largest=10**9
    )
    make_vocab_size_divisible_by: int = _other(
        128,
        "pad the vocabulary to a multiple of this and of TP, so that it does not depend on TP where TP "
        "divides it",
    )
    transformer_impl: str | None = _other(
        None,
        "Transformer Engine's layers where it is installed, Megatron's local ones otherwise",
        choices=("local", "transformer_engine"),
    )


def add_model_flags(parser: argparse.ArgumentParser, *, defaults: bool = True) -> None:
    """Add the flags that describe a model to a parser, in groups of their own."""
    for title in (MODEL, MIXTURE):
        names = names_with(ModelFields, group=title)
        add_flags(parser.add_argument_group(title), ModelFields, names, defaults=defaults)
