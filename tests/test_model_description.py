"""The one description of a model and of a run: flags of before, round trips, and what decides the losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helix_megatron.errors import HelixError
from helix_megatron.model.description import FREE_FLAGS, FUNCTION_FLAGS, ModelConfig
from helix_megatron.training.arguments import build_parser

BEFORE = json.loads((Path(__file__).parent / "flags_of_version_1.json").read_text())


def row(action) -> list:
    """What a flag is to a command line, except for its help."""
    kind = action.type and action.type.__name__
    choices = action.choices and list(action.choices)
    return [str(kind), action.default, choices, action.nargs, action.dest]


def test_flags_of_before_parse_unchanged():
    """Scripts of users hold these commands: names, types, defaults, choices and numbers of words."""
    actions = {action.option_strings[0]: action for action in build_parser()._actions}
    for flag, was in BEFORE["flags"].items():
        assert row(actions[flag]) == was, flag


def test_manifests_of_before_describe_the_same_model():
    """A checkpoint on disk outlives the code that wrote it: nothing is lost or read as something else."""
    model = ModelConfig.from_flags(BEFORE["manifest"])
    assert model.to_flags() == BEFORE["manifest"]
    whole = model.joined_heads(2)
    assert (whole.num_attention_heads, whole.num_query_groups, whole.head_dim) == (2, 1, 64)
    assert whole.cut_heads(2) == model
    assert model.moe_layers == (False, True, True, True)
    assert model.windowed_layers == (True, False, True, False)


def test_a_model_is_a_value():
    """Equal descriptions are equal and hash alike, whether read from JSON or built here."""
    model = ModelConfig.from_flags(BEFORE["manifest"])
    again = ModelConfig.from_flags(json.loads(json.dumps(model.to_flags())))
    assert again == model and hash(again) == hash(model)
    assert set(FUNCTION_FLAGS) | FREE_FLAGS == {f.name for f in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"norm_epsilon": float("nan")},
            "--norm-epsilon is nan. It must be a finite number above 0.",
        ),
        ({"rotary_base": 0}, "--rotary-base is 0. It must be a whole number above 0."),
        (
            {"ffn_hidden_size": 0},
            "--ffn-hidden-size is 0. It must be a whole number of at least 1.",
        ),
        ({"hidden_size": "64"}, "--hidden-size is '64'. It must be a whole number of at least 1."),
        ({"num_layers": True}, "--num-layers is True. It must be a whole number of at least 1."),
        ({"swiglu": 1}, "--swiglu is 1. It must be true or false."),
        ({"normalization": "Norm"}, "--normalization is 'Norm'. Valid: LayerNorm, RMSNorm."),
        ({"attention_dropout": 1.0}, "It must be a finite number of at least 0 and below 1."),
        ({"rotary_percent": 1.5}, "It must be a finite number above 0 and at most 1."),
        ({"num_layers": 2, "num_experts": 2, "moe_layer_freq": [2]}, "--moe-layer-freq is (2,)."),
    ],
)
def test_what_cannot_be_is_said(values, text):
    """A file may say what no parser would let through."""
    with pytest.raises(HelixError) as error:
        ModelConfig(**values)
    assert text in str(error.value)


EXPERTS = (
    "--num-experts 4 --moe-shared-expert-intermediate-size 16 --moe-layer-freq [0,1,1,1] --disable-bias-linear "
    "--window-size 8 --use-rope-scaling --fp16"
)
# One other value for every setting that decides the losses, and for those that do not.
LOSSES = {
    "num_layers": (2, {"moe_layer_freq": 2}),
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": (1, {"group_query_attention": True}),
    "kv_channels": 32,
    "seq_length": 64,
    "position_embedding_type": ("none", {"use_rope_scaling": False}),
    "rotary_base": 5000,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 4.0,
    "embedding_multiplier": 2.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-3,
    "apply_layernorm_1p": True,
    "swiglu": True,
    "geglu": True,
    "openai_gelu": True,
    "disable_bias_linear": (False, {"expert_tensor_parallel_size": 1}),
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "qk_l2_norm": True,
    "attention_output_gate": True,
    "window_size": 4,
    "window_attn_skip_freq": (1, 0, 1, 0),
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.01,
    "padded_vocab_size": (None, {"make_vocab_size_divisible_by": 1000}),
    "num_experts": 8,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.1,
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "global_batch_size": 8,
    "seed": 1,
    "optimizer": "sgd",
    "lr": 1e-2,
    "min_lr": 1e-4,
    "lr_decay_style": "linear",
    "lr_warmup_iters": 3,
    "lr_decay_iters": 20,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_eps": 1e-4,
    "clip_grad": 0.1,
    "loss_scale": 8.0,
    "initial_loss_scale": 16.0,
    "text": ["x"],
    "data_path": ["x"],
    "split": "1,1,1",
}
NOT_LOSSES = {
    "vocab_size": 255,
    "max_position_embeddings": 512,
    "transformer_impl": "local",
    "moe_token_dispatcher_type": "allgather",
    "micro_batch_size": 2,
    "recompute_granularity": "full",
    "log_interval": 3,
    "save": "somewhere",
    "use_distributed_optimizer": True,
    "distributed_backend": "gloo",
}
