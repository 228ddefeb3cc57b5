"""Checkpoints between Helix and stock megatron-core, in a process that cannot import helix_megatron."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import RankError
from training_runs import EP, TP, M, run
from waiting import PROGRAM_LIMIT

from helix_megatron.checkpoint.store import Store
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

TOKENS = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(5))
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 16 --micro-batch-size 4 --train-iters 3 --lr 3e-3 --swiglu --disable-bias-linear "
    "--log-communication-time off --qk-layernorm"
)
EXPERTS = f"{FLAGS} --num-experts 4 --moe-ffn-hidden-size 32"
CONFIG = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "qk_layernorm": True,
}
GPT = {
    "vocab_size": 256,
    "max_sequence_length": 16,
    "position_embedding_type": "rope",
    "share_embeddings_and_output_weights": True,
}
SPEC = {"qk_layernorm": True}
# name: (flags of Helix, layout, ranks, the same model for stock megatron-core)
MODELS = {
    "dense, (2,2)": (FLAGS, f"{TP} 4 {M} 2", 4, {"config": CONFIG, "spec": SPEC}),
    "experts, (2,2), EP 2": (
        EXPERTS,
        f"{TP} 4 {M} 2 --sequence-parallel {EP} 2",
        4,
        {
            "config": CONFIG | {"num_moe_experts": 4, "moe_ffn_hidden_size": 32},
            "spec": SPEC | {"num_experts": 4},
        },
    ),
}
# Experts have all that the dense model has.
NAMES = [
    pytest.param(name, marks=[pytest.mark.full("checkpoints")] * (name == "dense, (2,2)"))
    for name in MODELS
]


def stock(action: str, directory: Path, model: dict[str, Any], scratch: Path) -> list[float]:
    """Losses of the samples, computed by stock megatron-core after it has loaded or before it has saved."""
    description = scratch / "model.json"
    description.write_text(json.dumps({"gpt": GPT, "tokens": TOKENS.tolist()} | model))
    script = Path(__file__).parents[1] / "stock_megatron.py"
    done = subprocess.run(
        [sys.executable, str(script), action, str(directory), str(description)],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def losses_on_ranks(flags: str, world_size: int) -> list[float]:
    """Losses of the samples on this rank, of the model that --load names."""
    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.checkpointing import Checkpointing
    from helix_megatron.training.optimizer import build_optimizer
    from helix_megatron.training.pretrain import build

    cpu_runtime.install()
    run = validate(parse_args(flags.split()), world_size)
    _, chunks = build(run)
    Checkpointing(run, chunks, *build_optimizer(run, chunks)).load()
    model = chunks[0].eval()
    inputs, labels = TOKENS[:, :-1], TOKENS[:, 1:].contiguous()
    positions = torch.arange(inputs.size(1)).expand_as(inputs)
    with torch.no_grad():
        return model(inputs, positions, None, labels=labels).mean(1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_stock_megatron_core_loads_what_helix_saved(pool, tmp_path, name):
    """No key is missing and none is left over; the losses are those that Helix computes on its ranks."""
    flags, layout, ranks, model = MODELS[name]
    directory = tmp_path / "store"
    run(pool, f"{flags} {layout} --save {directory}", ranks)
    theirs = stock("load", Store(directory).resolve(), model, tmp_path)
    load = f"{flags} {layout} --load {directory} --finetune"
    by_rank = pool.run(losses_on_ranks, load, ranks, world_size=ranks)
    for ours in by_rank:
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_helix_loads_what_stock_megatron_core_saved(pool, tmp_path, name):
    """A checkpoint without manifest, arguments or optimizer, as megatron-core's own `save` writes it."""
    flags, layout, ranks, model = MODELS[name]
    directory = tmp_path / "iter_0000001"
    theirs = stock("save", directory, model, tmp_path)
    load = f"{flags} {layout} --load {directory} --finetune"
    by_rank = pool.run(losses_on_ranks, load, ranks, world_size=ranks)
    for ours in by_rank:
        assert ours == pytest.approx(theirs, abs=1e-6)


LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 10,
    "rotary_scaling_factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "ffn_hidden_size": 48,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
    "moe_shared_expert_intermediate_size": 24,
    "moe_router_topk_scaling_factor": 1.5,
}
# What Megatron-LM's arguments call otherwise, or have beside; the head size is what it fills in.
ARGUMENTS = {
    "num_experts": 4,
    "swiglu": True,
    "norm_epsilon": 1e-6,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "rope_type": None,
    "kv_channels": 8,
    "group_query_attention": False,
    "num_query_groups": 1,
    "vocab_size": 256,
    "padded_vocab_size": 256,
    "max_position_embeddings": 16,
    "moe_router_load_balancing_type": "aux_loss",
}


@pytest.mark.filterwarnings("ignore:config.json sets .* is ignored")
def test_latent_attention_of_megatron_lm_goes_to_hugging_face(tmp_path):
    """Its own names of rotary settings and of norms: the losses are those of transformers' DeepSeek-V3."""
    from transformers import AutoModelForCausalLM

    from helix_megatron import cli

    beside = {
        "num_moe_experts": 4,
        "gated_linear_unit": True,
        "layernorm_epsilon": 1e-6,
        "kv_channels": 10,
    }
    model = {
        "config": LATENT | beside,
        "spec": {"normalization": "RMSNorm"},
        "gpt": GPT | {"share_embeddings_and_output_weights": False},
        "args": LATENT | ARGUMENTS,
    }
    directory, back = tmp_path / "iter_0000001", tmp_path / "hf"
    theirs = stock("save", directory, model, tmp_path)
    assert cli.main(["convert", str(directory), str(back), "--to", "huggingface"]) == 0
    found = AutoModelForCausalLM.from_pretrained(back).eval()
    assert found.config.model_type == "deepseek_v3"
    inputs, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    with torch.no_grad():
        logits = found(inputs, use_cache=False).logits.transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(1)
    assert losses.tolist() == pytest.approx(theirs, abs=1e-5)


def test_weights_without_a_place_are_refused(pool, tmp_path):
    """An output layer of its own, loaded into a model with tied embeddings, would be dropped in silence."""
    flags, layout, ranks, model = MODELS["dense, (2,2)"]
    directory = tmp_path / "iter_0000001"
    untied = model | {"gpt": GPT | {"share_embeddings_and_output_weights": False}}
    stock("save", directory, untied, tmp_path)
    load = f"{flags} {layout} --load {directory} --finetune"
    with pytest.raises(RankError, match=r"has no place for: output_layer\.weight"):
        pool.run(losses_on_ranks, load, ranks, world_size=ranks)
