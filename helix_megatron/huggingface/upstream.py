"""What Helix takes from `transformers` and accelerate, and whether the installed releases have it."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import Any

from helix_megatron.errors import HelixError, listed
from helix_megatron.model.families import CUTTABLE
from helix_megatron.needs import Need, sentence, unmet

NEEDS = (
    Need("transformers:AttentionInterface.register", "no attention function can be registered"),
    Need("transformers:AttentionMaskInterface.register", "no mask function can be registered"),
    Need("transformers:Cache.update", "generation with a cache does not work"),
    Need(
        "transformers:PreTrainedModel.set_attn_implementation",
        "a model cannot be told to use Helix attention",
    ),
    Need(
        "transformers:LlamaConfig._attn_implementation",
        "another attention implementation on a sharded model would go unnoticed",
    ),
    Need(
        "transformers:LlamaConfig._experts_implementation",
        "kernels that do not know parts of experts would go unnoticed",
    ),
    Need(
        "transformers:PreTrainedModel.set_experts_implementation",
        "experts of odd sizes cannot be run one by one",
    ),
    Need(
        "transformers:PreTrainedModel.get_output_embeddings",
        "the vocabulary cannot be cut",
    ),
    Need("transformers:PreTrainedModel.initialize_weights", "from_pretrained has no rotary tables"),
    Need(
        "transformers.conversion_mapping:get_checkpoint_conversion_mapping",
        "it is not known what files call the weights of experts",
    ),
    Need(
        "transformers:PreTrainedModel.tp_size",
        "a model that the library has cut already would be cut again",
    ),
    Need(
        "transformers:PreTrainedModel.use_kernels",
        "kernels from the Hub in place of modules would go unnoticed",
    ),
)
TRAINER_NEEDS = (
    Need(
        "transformers:Trainer.create_accelerator_and_postprocess",
        "ShardedTrainer cannot take gradient norms over all ranks",
    ),
    Need(
        "transformers:Trainer.compute_loss",
        "ShardedTrainer cannot keep ranks from being counted as replicas",
    ),
)
ACCELERATE_NEEDS = (
    Need("accelerate:ParallelismConfig", "ShardedTrainer cannot say that ranks share a model"),
    Need(
        "accelerate.utils.other:get_model_tp_size",
        "ShardedTrainer cannot say how a model is sharded",
    ),
    Need(
        "accelerate:Accelerator.clip_grad_norm_",
        "ShardedTrainer cannot take gradient norms over all ranks",
    ),
    Need(
        "accelerate:ParallelismConfig._validate_accelerator",
        "ShardedTrainer does not run on ranks without GPUs",
    ),
)

ATTENTION_INPUTS = ("hidden_states", "position_embeddings", "attention_mask")

_TINY = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def require() -> None:
    """Raise what the installed `transformers` lacks for sharding a model."""
    if problems := unmet("transformers", NEEDS):
        raise HelixError(problems[0])


def require_trainer() -> None:
    """Raise what the installed `transformers` and accelerate lack for `ShardedTrainer`."""
    problems = unmet("transformers", TRAINER_NEEDS)
    if problems := problems or unmet("accelerate", ACCELERATE_NEEDS):
        raise HelixError(problems[0])


def check() -> list[str]:
    """All that Helix needs and the installed `transformers` and accelerate have not, in sentences.

    A tiny empty model of every family is built. Nothing is said of a package that is not installed.
    """
    if find_spec("transformers") is None:
        return []
    problems = unmet("transformers", (*NEEDS, *TRAINER_NEEDS))
    if find_spec("accelerate") is not None:
        problems += unmet("accelerate", ACCELERATE_NEEDS)
    for kind in CUTTABLE:
        problems += _check_family(kind)
    return problems


def check_attention(module: Any) -> str | None:
    """What the forward pass of an attention module does not take, after "has"; None if nothing is."""
    taken = inspect.signature(type(module).forward).parameters
    lacking = [name for name in ATTENTION_INPUTS if name not in taken]
    return f"a {type(module).__name__} that is not given {listed(lacking)}" if lacking else None


def _check_family(kind: str) -> list[str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from helix_megatron.huggingface.forms import attention_form, expert_cuts, mlp_cuts

    def said(what: str) -> list[str]:
        return [sentence("transformers", what, f"models of type {kind} cannot be sharded")]

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_TINY))
        modules = list(model.modules())
        attention = next((m for m in modules if attention_form(m)), None)
    except Exception as error:
        return said(f"no tiny model of type {kind} ({type(error).__name__}: {error})")
    if attention is None:
        return said(f"no attention of a known form in its {type(model).__name__}")
    problems = []
    lacking = [
        f"{norm}.variance_epsilon"
        for norm in ("q_norm", "k_norm")
        if hasattr(attention, norm) and not hasattr(getattr(attention, norm), "variance_epsilon")
    ]
    if lacking:
        problems += said(f"a {type(attention).__name__} without {listed(lacking)}")
    if what := check_attention(attention):
        problems += said(what)
    if not any(dict(mlp_cuts(m, 1)) or dict(expert_cuts(m, 1)) for m in modules):
        problems += said(f"no MLP of a known form in its {type(model).__name__}")
    return problems
