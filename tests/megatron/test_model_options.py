"""Options of the model: what they mean together, the same training at every layout, models from flags alone."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import run_of

from helix_megatron.arguments import as_flag
from helix_megatron.errors import HelixError
from helix_megatron.megatron.model_options import (
    activation,
    can_fuse_activation,
    scale_residuals,
    tanh_gelu,
)
from helix_megatron.model.description import ModelConfig
from helix_megatron.model.patterns import layer_pattern
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

SIZE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 "
    "--train-iters 6 --log-communication-time off"
)
CUT = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2 --sequence-parallel"
GEMMA = (
    "--geglu --disable-bias-linear --normalization RMSNorm --apply-layernorm-1p "
    "--embedding-multiplier 5.5 --hidden-dropout 0.1"
)
GPT2 = (
    "--openai-gelu --position-embedding-type learned_absolute --max-position-embeddings 48 "
    "--window-size 5 --window-attn-skip-freq [0,1]"
)
LLAMA = (
    "--swiglu --disable-bias-linear --normalization RMSNorm --use-rope-scaling "
    "--rotary-base 500000 --rope-scaling-factor 32 --rotary-seq-len-interpolation-factor 2"
)
QWEN_EXPERTS = (
    "--swiglu --disable-bias-linear --normalization RMSNorm --num-experts 4 --moe-ffn-hidden-size 16 "
    "--moe-router-pre-softmax --moe-shared-expert-intermediate-size 24 --moe-shared-expert-gate "
    "--moe-layer-freq [0,1]"
)
FLAGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "vocab_size": 91,
    "padded_vocab_size": 91,
    "make_vocab_size_divisible_by": 1,
}


def train(flags: str, world_size: int) -> list[dict[str, float]]:
    """Train on this rank; what each iteration measured."""
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.pretrain import training

    cpu_runtime.install()
    run = validate(parse_args(flags.split()), world_size)
    return [metrics.record() for metrics in training(run)]


@pytest.mark.parametrize("model", [GEMMA, GPT2, LLAMA, QWEN_EXPERTS])
def test_training_with_options_does_not_depend_on_the_layout(pool, model):
    """Logits of converted models show the forward pass only; gradients of options must be right, too."""
    expected = pool.run(train, f"{SIZE} {model}", 1, world_size=1)[0]
    found = pool.run(train, f"{SIZE} {model} {CUT}", 4, world_size=4)[0]
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.2, "it learns"
    for key in ("lm_loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=2e-5)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("3", 3),
        ("[0,1,1]", (0, 1, 1)),
        ("([0]+[1]*2)*2", (0, 1, 1, 0, 1, 1)),
        (" 2*[1] ", (1, 1)),
    ],
)
def test_layer_patterns(text, pattern):
    """Megatron-LM's notation is read, so its commands can be copied."""
    assert layer_pattern(text) == pattern


@pytest.mark.parametrize(
    "text", ["0", "-1", "[]", "[2]", "[0,[1]]", "x", "__import__('os')", "[1].append(0)", "1.5", ""]
)
def test_other_patterns_are_refused(text):
    """Nothing but sums and products is evaluated: a flag must not run code."""
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 1 nor a list"):
        layer_pattern(text)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--swiglu --geglu", "--swiglu, --geglu exclude each other. Give one of them."),
        ("--openai-gelu --swiglu", "--swiglu, --openai-gelu exclude each other."),
        (
            "--embedding-multiplier 0",
            "--embedding-multiplier is 0.0. It must be a finite number above 0.",
        ),
        (
            "--use-rope-scaling --position-embedding-type none",
            "scale rotary embedding, and --position-embedding-type is none. Leave them out.",
        ),
        ("--window-attn-skip-freq 2", "there is none. Add --window-size, or leave it out."),
        *(
            (f"--attn-logit-softcapping 50 {other}", "Leave out these, or the soft cap.")
            for other in ("--softmax-type learnable", "--transformer-impl transformer_engine")
        ),
        (
            "--window-size 4 --window-attn-skip-freq [0,1]",
            "--window-attn-skip-freq lists 2 layers, and --num-layers is 4. List all of them.",
        ),
        (
            "--num-experts 2 --moe-layer-freq [1]",
            "--moe-layer-freq lists 1 layers, and --num-layers is 4.",
        ),
        ("--num-experts 2 --moe-layer-freq [0]*4", "--moe-layer-freq gives experts to no layer."),
        ("--num-experts 2 --moe-router-topk 1", "needs --moe-router-pre-softmax"),
        ("--num-experts 2 --moe-shared-expert-gate", "--moe-shared-expert-intermediate-size"),
    ],
)
def test_options_that_do_not_go_together(flags, text):
    """One paragraph before any rank starts, instead of an exception out of Megatron, or silence."""
    with pytest.raises(HelixError) as error:
        validate(parse_args(flags.split()), 1)
    assert text in error.value.worded(as_flag)


def test_activations():
    """The tanh form is not the exact one, and has no fused kernel that would quietly replace it."""
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert (tanh_gelu(x) - torch.nn.functional.gelu(x)).abs().max() > 1e-4
    root = (2 / torch.pi) ** 0.5
    assert torch.allclose(tanh_gelu(x), x / 2 * (1 + torch.tanh(root * (x + 0.044715 * x**3))))
    for flags, function, fused in (
        ({}, torch.nn.functional.gelu, False),
        ({"swiglu": True}, torch.nn.functional.silu, True),
        ({"geglu": True}, tanh_gelu, False),
        ({"openai_gelu": True}, tanh_gelu, False),
    ):
        model = ModelConfig(**flags)
        assert activation(model) is function and can_fuse_activation(model) is fused


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"num_layer": 2}, "no flag 'num_layer'. Did you mean num_layers?"),
        ({"num_attention_heads": 5}, "--hidden-size 64 does not divide into"),
        ({"swiglu": True, "geglu": True}, "exclude each other"),
    ],
)
def test_flags_that_do_not_fit_are_refused(changed, text):
    """A manifest of a newer version, or a hand-written one, must not half work."""
    with pytest.raises(HelixError) as error:
        ModelConfig.from_flags(FLAGS | changed)
    assert text in error.value.worded(as_flag)


def fill_wrongly() -> list[str]:
    """Errors of `fill_weights` for a tensor of another size, and for a weight that has no name."""
    from helix_megatron import parallel_state
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.megatron.fill import fill_weights
    from helix_megatron.megatron.gpt import build_chunk, transformer_config
    from helix_megatron.megatron.random import seed_model_parallel

    cpu_runtime.install()
    run = run_of(FLAGS)
    parallel_state.initialize_model_parallel(1, distributed_timeout_minutes=10)
    seed_model_parallel(1)
    model = build_chunk(run, transformer_config(run))
    shapes = {"embedding.word_embeddings.weight": (90, 64)}
    errors = []
    with pytest.raises(HelixError) as error:
        fill_weights(model, lambda name: torch.zeros(shapes.get(name, (1, 64))))
    errors.append(str(error.value))
    model.register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    model.sharded_state_dict = lambda metadata: {}
    with pytest.raises(HelixError) as error:
        fill_weights(model, torch.zeros)
    return [*errors, str(error.value)]


def test_filling_a_model_wrongly_is_refused(pool):
    """A tensor that fits by broadcasting, or a weight left as it was, would be a wrong model without a word."""
    wrong, missing = pool.run(fill_wrongly, world_size=1)[0]
    assert "has shape [1, 64], and the model needs [" in wrong
    assert "is not in the model's sharded state dictionary, so it has no canonical name" in missing


def test_canonical_names():
    """Whether Megatron stacks layers or not, a tensor has one name."""
    from helix_megatron.megatron.fill import canonical_name

    expert = "decoder.layers.3.mlp.experts.2.linear_fc1.weight"
    experts = "mlp.experts.experts.linear_fc1.weight"
    assert canonical_name(f"decoder.layers.{experts}", (3, 2)) == expert
    assert canonical_name(f"decoder.layers.3.{experts}", (2,)) == expert
    assert canonical_name("decoder.layers.mlp.router.weight", (0,)) == (
        "decoder.layers.0.mlp.router.weight"
    )
    assert canonical_name("decoder.final_layernorm.weight", ()) == "decoder.final_layernorm.weight"


class Part(torch.nn.Module):
    """As Megatron's: its output, and a bias."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 3 * x, None


@pytest.mark.parametrize("projection", ["linear_proj", "out_proj"])
def test_residuals_are_scaled_behind_attention_of_any_kind(projection):
    """Attention and gated delta nets name their last projection differently."""
    attention, mlp, x = torch.nn.Module(), Part(), torch.ones(2)
    setattr(attention, projection, Part())
    layer = SimpleNamespace(self_attention=attention, mlp=mlp)
    scale_residuals(SimpleNamespace(decoder=SimpleNamespace(layers=[layer])), 0.5)
    for part in (getattr(attention, projection), mlp):
        assert torch.equal(part(x)[0], 1.5 * x)
