"""The one description of a model and of a run: flags of before, round trips, and what decides the losses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from helix_megatron.arguments import as_flag
from helix_megatron.errors import HelixError
from helix_megatron.flags import Number, PathText, one_line, whole_or_real
from helix_megatron.model.description import FREE_FLAGS, FUNCTION_FLAGS, ModelConfig
from helix_megatron.run.config import RunConfig
from helix_megatron.run.settings import Data, Optimization, Training, same_named
from helix_megatron.training.arguments import build_parser, parse_args

BEFORE = json.loads((Path(__file__).parents[1] / "flags_of_version_1.json").read_text())


def row(action) -> list:
    """What a flag is to a command line, except for its help."""
    kind = getattr(action.type, "__self__", action.type)
    kind = kind.kind if isinstance(kind, Number) else kind
    kind = int if kind is whole_or_real else kind  # what is no whole number is new
    kind = str if kind is one_line or isinstance(kind, PathText) else kind
    kind = kind and kind.__name__
    choices = action.choices and list(action.choices)
    return [str(kind), action.default, choices, action.nargs, action.dest]


def test_flags_of_before_parse_unchanged():
    """Scripts of users hold these commands: names, types, defaults, choices and numbers of words."""
    actions = {action.option_strings[0]: action for action in build_parser()._actions}
    for flag, was in BEFORE["flags"].items():
        kind, default, choices, nargs, name = row(actions[flag])
        known = choices and [one for one in choices if one in (was[2] or ())]  # others are new
        assert [kind, default, known, nargs, name] == was, flag


def test_manifests_of_before_describe_the_same_model():
    """A checkpoint on disk outlives the code that wrote it: nothing is lost or read as something else."""
    model = ModelConfig.from_flags(BEFORE["manifest"])
    new = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    assert model.to_flags() == new | BEFORE["manifest"]
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
        ({"rotary_base": 0}, "--rotary-base is 0. It must be a finite number of at least 1."),
        (
            {"ffn_hidden_size": 0},
            "--ffn-hidden-size is 0. It must be a whole number of at least 1.",
        ),
        ({"hidden_size": "64"}, "--hidden-size is '64'. It must be a whole number of at least 1."),
        ({"num_layers": True}, "--num-layers is True. It must be a whole number of at least 1."),
        ({"swiglu": 1}, "--swiglu is 1. It must be true or false."),
        ({"normalization": "Norm"}, "--normalization is 'Norm'. Valid: LayerNorm, RMSNorm."),
        ({"attention_dropout": 1.0}, "It must be a finite number of at least 0 and below 1."),
        (
            {"num_layers": 10**12},
            "--num-layers is 1000000000000. The largest valid value is 10,000.",
        ),
        ({"num_experts": 10**9}, "--num-experts is 1000000000. The largest valid value is 10,000."),
        ({"num_layers": 10**3, "num_experts": 10**4}, "are more than 200,000 experts"),
        ({"rotary_percent": float("nan")}, "It must be a finite number above 0 and at most 1."),
        ({"num_experts": 2, "moe_layer_freq": [[1]]}, "or a list of 0 and 1"),
        ({"rotary_percent": 1.5}, "It must be a finite number above 0 and at most 1."),
        ({"num_layers": 2, "num_experts": 2, "moe_layer_freq": [2]}, "--moe-layer-freq is (2,)."),
    ],
)
def test_what_cannot_be_is_said(values, text):
    """A file may say what no parser would let through."""
    with pytest.raises(HelixError) as error:
        ModelConfig(**values)
    assert text in error.value.worded(as_flag)


# A model in which every setting of the tables below has an effect.
BASE = (
    "--num-experts 4 --moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 16 "
    "--moe-layer-freq [0,1,1,1] --hidden-size 32 --seq-length 32 --disable-bias-linear "
    "--window-size 8 --use-rope-scaling --fp16 "
    "--global-batch-size 4 --lr-decay-iters 40 --train-iters 3 --initial-loss-scale 1024"
)
# One other value for every setting that decides the losses; what must change with it, too.
POST_NORMS = {"num_experts": None, "normalization": "RMSNorm", "post_norms": True}
YARN = {"position_embedding_type": "yarn", "use_rope_scaling": False}
LINEAR = {
    "linear_attention_freq": 2,
    "normalization": "RMSNorm",
    "swiglu": True,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
HYBRID = {
    "num_layers": 2,
    "moe_layer_freq": 1,
    "normalization": "RMSNorm",
    "use_rope_scaling": False,
}
MAMBA = HYBRID | {"hybrid_layer_pattern": "ME"}
LATENT = {
    "multi_latent_attention": True,
    "use_rope_scaling": False,
    "window_size": None,
    "normalization": "RMSNorm",
    "qk_layernorm": True,
}
DECIDES = {
    "num_layers": (2, {"moe_layer_freq": 2}),
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": (1, {"group_query_attention": True}),
    "kv_channels": 32,
    "seq_length": 64,
    "position_embedding_type": ("none", {"use_rope_scaling": False}),
    "rotary_base": 5000,
    "rotary_base_windowed": 500,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "rotary_seq_len_interpolation_factor": 2.0,
    "use_rope_scaling": False,
    "rope_scaling_factor": 4.0,
    "rope_high_freq_factor": 2.0,
    "yarn_rotary_scaling_factor": (2.0, YARN),
    "yarn_original_max_position_embeddings": (64, YARN),
    "yarn_beta_fast": (8.0, YARN),
    "yarn_beta_slow": (0.5, YARN),
    "yarn_mscale": (2.0, YARN),
    "yarn_mscale_all_dim": (1.0, YARN),
    "yarn_correction_range_round_to_int": (True, YARN),
    "no_rope_freq": 2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "normalization": "RMSNorm",
    "post_norms": (True, POST_NORMS),
    "no_pre_norms": (True, POST_NORMS),
    "norm_epsilon": 1e-3,
    "apply_layernorm_1p": True,
    "swiglu": True,
    "geglu": True,
    "openai_gelu": True,
    "quick_geglu": True,
    "squared_relu": True,
    "activation_func_clamp_value": (2.0, {"swiglu": True}),
    "glu_linear_offset": (1.0, {"swiglu": True}),
    "disable_bias_linear": False,
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "qk_norm_behind_rotary": (True, {"qk_layernorm": True}),
    "qk_norm_all_heads": (True, {"normalization": "RMSNorm", "qk_layernorm": True}),
    "qk_l2_norm": True,
    "attention_output_gate": True,
    "softmax_scale": 0.3,
    "softmax_type": "learnable",
    "window_size": 4,
    "window_attn_skip_freq": (2, {}),
    "linear_attention_freq": (2, LINEAR),
    "linear_num_key_heads": (4, {k: v for k, v in LINEAR.items() if k != "linear_num_key_heads"}),
    "linear_num_value_heads": (
        8,
        {k: v for k, v in LINEAR.items() if k != "linear_num_value_heads"},
    ),
    "linear_key_head_dim": (8, LINEAR),
    "linear_value_head_dim": (8, LINEAR),
    "linear_conv_kernel_dim": (3, LINEAR),
    "hybrid_layer_pattern": ("*E", HYBRID),
    "moe_latent_size": (8, MAMBA),
    "mamba_num_heads": (8, MAMBA),
    "mamba_head_dim": (8, MAMBA),
    "mamba_state_dim": (8, MAMBA),
    "mamba_num_groups": (2, MAMBA),
    "mamba_time_step_min": (0.1, MAMBA),
    "multi_latent_attention": (True, LATENT),
    "q_lora_rank": (8, LATENT),
    "kv_lora_rank": (8, LATENT),
    "qk_head_dim": (8, LATENT),
    "qk_pos_emb_head_dim": (8, LATENT),
    "v_head_dim": (8, LATENT),
    "untie_embeddings_and_output_weights": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "init_method_std": 0.01,
    "padded_vocab_size": 320,
    "num_experts": 8,
    "moe_layer_freq": 1,
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 3,
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": (True, {"moe_router_score_function": "sigmoid"}),
    "moe_router_num_groups": (2, {"moe_router_group_topk": 1}),
    "moe_router_group_topk": (1, {"moe_router_num_groups": 2}),
    "latent_norm_epsilon": (1e-4, LATENT),
    "moe_router_groups_by_best": (
        True,
        {"moe_router_num_groups": 2, "moe_router_group_topk": 2},
    ),
    "moe_router_topk_scaling_factor": 1.5,
    "moe_router_dtype": "fp32",
    "moe_apply_probs_on_input": (True, {"moe_router_topk": 1, "moe_router_pre_softmax": True}),
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.1,
    "moe_shared_expert_intermediate_size": 24,
    "moe_shared_expert_gate": True,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "seed": 1,
    "bf16": (True, {"fp16": False}),
    "fp16": False,
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
    "packed_documents": (True, {"data_path": ["x"]}),
    "split": "900,50,50",
}
# For every other setting a value at which the losses are the same numbers; None where that needs no proof.
CHANGES_NOTHING = {
    "group_query_attention": (True, {"num_query_groups": 2}),
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "make_vocab_size_divisible_by": 64,
    "transformer_impl": "local",
    "moe_token_dispatcher_type": "allgather",
    "train_iters": 2,
    "no_check_for_nan_in_loss_and_grad": True,
    "recompute_granularity": None,  # test_training has it; stock attention recomputes on GPUs only
    "recompute_method": "block",
    "recompute_num_layers": 2,
    "data_cache_path": None,
    "tokenizer_type": None,  # the files of --data-path hold tokens already
    "tokenizer_model": None,
}


def run_with(name: str | None = None, change: object = None) -> RunConfig:
    values = parse_args(BASE.split())
    if name is not None:
        value, others = change if isinstance(change, tuple) else (change, {})
        values |= {name: value} | others
    run = RunConfig.from_values(values, 1)
    return run if run.model.padded_vocab_size else run.with_vocabulary(256)


def built(run: RunConfig) -> dict:
    """What Megatron and the data are told, functions by their names."""
    from helix_megatron.megatron.gpt import transformer_config
    from helix_megatron.training.optimizer import schedule_settings

    config = vars(transformer_config(run))
    named = {k: getattr(v, "__qualname__", v) for k, v in config.items() if "init_method" not in k}
    model, training = run.model, run.training
    told = {
        "multipliers": (
            model.embedding_multiplier,
            model.residual_multiplier,
            model.logits_scaling,
        ),
        "router": model.moe_router_groups_by_best,
        "qk": (model.qk_l2_norm, model.qk_norm_all_heads, model.qk_norm_behind_rotary),
        "norms": (model.post_norms, model.no_pre_norms),
        "windowed": model.rotary_base_windowed,
        "rope": model.rope_high_freq_factor,
        "hybrid": (model.hybrid_layer_pattern, model.mamba_time_step_min),
        "init": model.init_method_std,
    }
    for group in (run.parallel, training, run.optimization):
        told |= same_named(group, "optimizer")
    told |= {"data": (run.data, training.seed, model.seq_length)}
    told |= {"batch": (training.micro_batch_size, run.global_batch_size)}
    return named | model.gpt_settings | told | schedule_settings(run)


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_the_losses_is_told(name):
    """The report takes runs that agree in this for runs of one model, and their losses for comparable."""
    run, base = run_with(name, DECIDES[name]), run_with()
    assert built(run) != built(base), "the value has no effect, so that nothing is tested"
    assert run.decides_losses != base.decides_losses


def first_losses(names: list[str | None]) -> list[list[float]]:
    """On a rank: the losses of the base, or with one setting changed."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    losses = []
    for name in names:
        run = run_with(name, CHANGES_NOTHING.get(name))
        losses.append([metrics.lm_loss for metrics in training(run)][:2])
        parallel_state.destroy_model_parallel()
    return losses


def test_what_is_left_out_changes_no_loss(pool):
    """Left out wrongly, two different runs would be compared; told needlessly, equal ones would not."""
    fields = [
        f.name
        for settings in (ModelConfig, Training, Optimization, Data)
        for f in dataclasses.fields(settings)
    ]
    assert sorted([*DECIDES, *CHANGES_NOTHING]) == sorted(fields)
    names = [name for name, value in CHANGES_NOTHING.items() if value is not None]
    for name in names:
        assert run_with(name, CHANGES_NOTHING[name]).decides_losses == run_with().decides_losses, (
            name
        )
    base, *losses = pool.run(first_losses, [None, *names], world_size=1)[0]
    assert len(base) == 2 and base[0] != base[1]
    for name, found in zip(names, losses, strict=True):
        assert found == pytest.approx(base, rel=1e-6), name


def test_without_effect_is_without_difference():
    """Settings of what a model does not have make no other model."""
    dense = ModelConfig(vocab_size=256)
    for changed in ({"moe_router_topk": 1}, {"moe_ffn_hidden_size": 8}, {"add_qkv_bias": True}):
        assert dataclasses.replace(dense, **changed).decides_losses == dense.decides_losses
    run = RunConfig(dense, 1)
    scaled = dataclasses.replace(run, optimization=Optimization(loss_scale=2.0))
    smaller = dataclasses.replace(run, training=Training(2, 4))
    assert scaled.decides_losses == smaller.decides_losses == run.decides_losses
