"""A model loaded for inference computes what transformers computes, from any kind of checkpoint at any layout.

The oracle is `transformers`: it makes the models, saves them, and computes the logits, in fp32 and in fp64.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import save, tokens
from pool import RankError
from torch.overrides import TorchFunctionMode
from waiting import printed_afresh

from helix_megatron import cli
from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.errors import HelixError
from helix_megatron.inference.arguments import (
    InferenceConfig,
    add_checkpoint_arguments,
    inference_config,
)
from helix_megatron.inference.tokens import ByteTokens, open_tokens
from helix_megatron.model.description import ModelConfig

FP32, FP64 = 1e-5, 1e-10
SEQUENCE = 24


def parsed(command: str, path: Path | str) -> argparse.Namespace:
    parser = add_checkpoint_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return parser.parse_args(["--load", str(path), *command.split()])


def config_of(command: str, path: Path | str, world_size: int = 1) -> InferenceConfig:
    return inference_config(vars(parsed(command, path)), world_size)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(name)`: (directory, logits of transformers in fp32 and fp64), made once."""

    @functools.cache
    def make(name: str) -> tuple[Path, torch.Tensor, torch.Tensor]:
        directory = tmp_path_factory.mktemp("model")
        logits = save(name, directory)
        return directory, logits, double_logits(directory)

    return make


class Wide(TorchFunctionMode):
    """transformers computes norms and softmax in fp32 whatever the model's dtype; here in fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.float:
            return args[0].double()
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*wide, **named)


def double_logits(directory: Path) -> torch.Tensor:
    """Of transformers in fp64, rotary tables excepted, which it and Megatron alike make in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = without_modes(module.forward)
    with torch.no_grad(), Wide():
        return model(tokens(SEQUENCE), use_cache=False).logits


def without_modes(function):
    def call(*args, **kwargs):
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def logits_of(
    path: str, command: str, length: int = SEQUENCE
) -> tuple[torch.Tensor, dict[str, Any]]:
    """On a rank: logits [2, s, V] of a plain full forward pass, and what was chosen."""
    import torch.distributed as dist

    from helix_megatron.inference.load import TORCH_DTYPES, inference_groups, load_model

    config = config_of(command, path, dist.get_world_size())
    inference_groups(config)
    model = load_model(config)
    assert not model.training
    for parameter in model.parameters():
        assert parameter.dtype == TORCH_DTYPES[config.dtype] and not parameter.requires_grad
    ids = tokens(SEQUENCE)[:, :length]
    if length < SEQUENCE:
        ids = ids[:1]
    positions = torch.arange(length).expand_as(ids)
    with torch.no_grad():
        logits = model(ids, positions, None, runtime_gather_output=True)
    chosen = {
        "m": config.run.helix.intra_head_parallel_size,
        "ep": config.run.parallel.expert_model_parallel_size,
        "etp": config.run.parallel.expert_tensor_parallel_size,
        "sp": config.run.parallel.sequence_parallel,
        "heads": config.run.model.num_attention_heads,
    }
    return logits[..., : config.run.model.vocab_size], chosen


def logits_of_each(path: str, commands: list[str]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """`logits_of`, one command after the other in the same processes."""
    from helix_megatron import parallel_state

    found = []
    for command in commands:
        found.append(logits_of(path, command))
        parallel_state.destroy_model_parallel()
    return found


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert wanted.abs().max() > 1 and found.isfinite().all() and found.dtype == wanted.dtype
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def convert(source: Path, target: Path, command: str) -> Path:
    assert cli.main(["convert", str(source), str(target), *command.split()]) == 0
    return target


# ------------------------------------------------------------------------- logits

# name: what is chosen on 2 and on 4 ranks, (m, EP, ETP)
CHOSEN = {
    "llama 2": ((1, 1, None), (1, 1, None)),
    "qwen3": ((1, 1, None), (2, 1, None)),
    "gemma": ((2, 1, None), (4, 1, None)),
    "gpt2": ((1, 1, None), (1, 1, None)),
    "mixtral": ((1, 2, 1), (2, 4, 1)),
    "qwen2 moe": ((1, 2, 1), (2, 4, 1)),
}


# All on 4 ranks; the quick tier has one dense model and one with experts on fewer.
ON_RANKS = [
    pytest.param(
        name,
        ranks,
        marks=[pytest.mark.full("inference")]
        * (
            ranks < 4
            and (name, ranks) not in {("qwen3", 1), ("mixtral", 1), ("gemma", 2), ("qwen2 moe", 2)}
        ),
    )
    for name in CHOSEN
    for ranks in (1, 2, 4)
]


@pytest.mark.parametrize(("name", "ranks"), ON_RANKS)
def test_logits_are_those_of_transformers(pool, models, name, ranks):
    """Multi-head, grouped and multi-query attention, learned positions, experts; on the layout chosen."""
    directory, single, double = models(name)
    experts = CHOSEN[name][0][2] is not None
    alone = (1, 1, 1 if experts else None)
    layout = (alone, *CHOSEN[name])[ranks.bit_length() - 1]
    commands = ["", "--dtype fp64"]
    for found in pool.run(logits_of_each, str(directory), commands, world_size=ranks):
        for (logits, chosen), wanted, tolerance in zip(
            found, (single, double), (FP32, FP64), strict=True
        ):
            # Megatron's router takes the softmax of its scores in fp32, whatever the model's dtype.
            assert error(logits, wanted) < (max(tolerance, 1e-6) if experts else tolerance)
            assert chosen["sp"] == (experts and ranks > 1)
            assert (chosen["m"], chosen["ep"], chosen["etp"]) == layout


LAYOUTS = [
    ("qwen3", 2, "--intra-head-parallel-size 2"),
    ("qwen3", 4, "--intra-head-parallel-size 2 --helix-query-layout segments"),
    ("llama with biases, tied", 4, ""),
    ("llama 2", 4, "--intra-head-parallel-size 4"),
    ("qwen2 moe", 4, "--expert-model-parallel-size 2 --expert-tensor-parallel-size 2"),
    ("qwen2 moe", 4, "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1"),
    ("mixtral", 4, "--expert-tensor-parallel-size 4 --moe-token-dispatcher-type allgather"),
]


@pytest.mark.parametrize(("name", "ranks", "command"), LAYOUTS)
def test_every_layout_is_exact(pool, models, name, ranks, command):
    """fp64 against the same model on one rank; experts too, whose router rounds alike on all ranks."""
    directory, *_ = models(name)
    ((alone, _),) = pool.run(logits_of, str(directory), "--dtype fp64", world_size=1)
    for logits, _ in pool.run(
        logits_of, str(directory), f"--dtype fp64 {command}", world_size=ranks
    ):
        assert error(logits, alone) < FP64


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_three_tokens_of_experts(pool, models, dispatcher):
    """A step of decoding: fewer tokens than ranks are padded to one for each, and most experts get none."""
    directory, *_ = models("qwen2 moe")
    command = f"--dtype fp64 --moe-token-dispatcher-type {dispatcher}"
    ((alone, _),) = pool.run(logits_of, str(directory), command, 3, world_size=1)
    for logits, _ in pool.run(logits_of, str(directory), command, 4, world_size=4):
        assert error(logits[:, :3], alone) < FP64


def test_what_training_saved(pool, tmp_path):
    """Its optimizer state is left alone, its layout and dropout are its own; and its tokens are bytes."""
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --train-iters 1 "
    )
    flags += (
        "--tensor-model-parallel-size 4 --intra-head-parallel-size 4 --init-method-std 0.5 --bf16 "
    )
    flags += f"--hidden-dropout 0.1 --make-vocab-size-divisible-by 320 --save {tmp_path}"
    pool.run(train, flags, world_size=4)
    own = pool.run(logits_of, str(tmp_path), "--dtype fp64", world_size=1)[0][0]
    less_padding = "--dtype fp64 --make-vocab-size-divisible-by 1"
    logits = pool.run(logits_of, str(tmp_path), less_padding, world_size=2)[0][0]
    assert logits.shape[-1] == 256 and error(logits, own) < FP64
    config = config_of("", tmp_path)
    model = config.run.model
    assert (model.vocab_size, model.hidden_dropout, model.max_position_embeddings) == (256, 0, 32)
    assert isinstance(open_tokens(config), ByteTokens)


def train(flags: str) -> None:
    """On a rank."""
    import torch.distributed as dist

    from helix_megatron.megatron import cpu_runtime
    from helix_megatron.training.arguments import parse_args
    from helix_megatron.training.pretrain import training
    from helix_megatron.training.validate import validate

    cpu_runtime.install()
    list(training(validate(parse_args(flags.split()), dist.get_world_size())))


def test_every_kind_of_checkpoint(pool, models, tmp_path):
    """Canonical ones, files per rank of another layout and padding, stock Megatron's: the same bits."""
    directory, single, _ = models("qwen3")
    canonical = convert(directory, tmp_path / "store", "--to canonical")
    cut = "--tensor-model-parallel-size 4 --intra-head-parallel-size 2"
    ranks = convert(
        canonical, tmp_path / "ranks", f"--to ranks {cut} --make-vocab-size-divisible-by 64"
    )
    stock = convert(directory, tmp_path / "stock", "--to canonical")
    for name in ("helix.json", "helix.json.sha256"):
        (stock / "release" / name).unlink()
    found = [
        pool.run(logits_of, str(path), "", world_size=2)[0][0]
        for path in (directory, canonical, ranks, stock)
    ]
    assert error(found[0], single) < FP32
    assert all(logits.equal(found[0]) for logits in found[1:])


def test_segment_local_checkpoints(pool, models, tmp_path):
    """As what they are, ordinary models with more heads; and by the attention that they were made for."""
    directory, *_ = models("llama 2")
    local = convert(
        directory,
        tmp_path / "local",
        "--to canonical --attention segment-local --segments 2 --allow-quality-loss",
    )
    ((alone, chosen),) = pool.run(logits_of, str(local), "--dtype fp64", world_size=1)
    assert chosen["heads"] == 8
    own = "--dtype fp64 --helix-attention segment-local"
    for command, heads in (("--dtype fp64", 8), (own, 4)):
        for logits, chosen in pool.run(logits_of, str(local), command, world_size=2):
            assert error(logits, alone) < FP64
            assert chosen["heads"] == heads
    for logits, chosen in pool.run(
        logits_of, str(local), "--dtype fp64 --intra-head-parallel-size 2", world_size=4
    ):
        assert error(logits, alone) < FP64 and chosen["m"] == 2
    with pytest.raises(HelixError, match=r"segment-local attention of 2 segments, and .* is 4"):
        config_of("--helix-attention segment-local --intra-head-parallel-size 4", local, 4)
    with pytest.raises(HelixError, match=r"holds ordinary weights.*helix convert"):
        config_of("--helix-attention segment-local --intra-head-parallel-size 2", directory, 2)


def parts_of(path: str, command: str) -> tuple[dict[str, torch.dtype], int]:
    """On a rank: dtypes of the parameters, and bytes of them."""
    import torch.distributed as dist

    from helix_megatron.inference.load import inference_groups, load_model

    config = config_of(command, path, dist.get_world_size())
    inference_groups(config)
    model = load_model(config)
    named = dict(model.named_parameters())
    return {n: p.dtype for n, p in named.items()}, sum(p.nbytes for p in named.values())


def test_half_precision_is_half_the_bytes(pool, models):
    """Learned positions too, which Megatron makes in fp32; and the router, as in its own models."""
    for name in ("gpt2", "mixtral"):
        directory, *_ = models(name)
        ((_, single),) = pool.run(parts_of, str(directory), "", world_size=1)
        ((dtypes, half),) = pool.run(parts_of, str(directory), "--dtype bf16", world_size=1)
        assert set(dtypes.values()) == {torch.bfloat16}
        assert 2 * half == single
        logits, _ = pool.run(logits_of, str(directory), "--dtype bf16", world_size=1)[0]
        assert logits.dtype == torch.bfloat16
        wanted = models(name)[1]
        assert 0 < (logits.float() - wanted).abs().max() / wanted.abs().max() < 0.1


# ------------------------------------------------------------------------- damage


def test_damaged_files_are_refused(pool, models, tmp_path):
    """A flipped bit in a weight would go unseen; every rank says the same."""
    store = convert(models("qwen3")[0], tmp_path / "store", "--to canonical")
    path = store / "release" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(RankError, match=r"HelixError: .*__0_0.distcp") as caught:
        pool.run(parts_of, str(store), "", world_size=2)
    assert "raised, too" in str(caught.value)


def with_layers(config: InferenceConfig, layers: int) -> InferenceConfig:
    model = dataclasses.replace(config.run.model, num_layers=layers)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, model=model))


def remove_a_layer(path: str) -> None:
    """On a rank: build a model of fewer layers than the checkpoint has, and the reverse."""
    from helix_megatron.inference.load import inference_groups, load_model

    config = config_of("", path)
    inference_groups(config)
    fewer, more = (with_layers(config, layers) for layers in (1, 3))
    with pytest.raises(
        HelixError, match=r"has 8 tensors that have no place.*decoder.layers.1.*, …"
    ):
        load_model(fewer)
    with pytest.raises(
        HelixError, match=r"has no tensor decoder.layers.2.*, which the model needs"
    ):
        load_model(more)


def test_every_tensor_has_its_place(pool, models):
    """Tensors without a place and places without a tensor are both named."""
    pool.run(remove_a_layer, str(models("qwen3")[0]), world_size=1)


# -------------------------------------------------------------------------- flags


def test_configuration(models):
    """What is run, and sentences about what was chosen."""
    config = config_of("", models("qwen3")[0], 4)
    run, model = config.run, config.run.model
    sizes = {"tp": 4, "pp": 1, "cp": 1, "dp": 1, "ep": 1, "m": 2, "n": 2}
    assert (run.world_size, run.sizes, run.layout.head_groups) == (4, sizes, 2)
    assert (model.vocab_size, model.max_position_embeddings) == (91, 64)
    assert model.padded_vocab_size % 4 == 0
    assert not run.parallel.sequence_parallel and run.training.recompute_granularity is None
    assert (config.dtype, run.training.precision) == ("fp32", "fp32")
    assert config.notes == (
        "2 key-value heads on 4 ranks: every head is cut into 2 segments (--intra-head-parallel-size 2), in 2 "
        "head groups.",
    )
    config = config_of("--dtype bf16 --seed 3", models("mixtral")[0], 2)
    assert (config.run.training.precision, config.run.training.seed) == ("bf16", 3)
    assert config.run.parallel.sequence_parallel
    assert config.notes[1] == "4 experts on 2 ranks: 2 on each, whole."


def test_overrides_are_for_those_who_do_not_say_everything(models, tmp_path):
    """A model that says what it is cannot be told otherwise; stock Megatron's can."""
    directory, *_ = models("qwen3")
    with pytest.raises(HelixError, match=r"--rotary-base 5: .* holds a model with \d+\. Leave"):
        config_of("--rotary-base 5", directory)
    longer = config_of("--max-position-embeddings 128", directory)
    assert longer.run.model.max_position_embeddings == 128
    assert longer.notes == ("--max-position-embeddings is 128, where the checkpoint says 64.",)
    stock = convert(directory, tmp_path / "stock", "--to canonical")
    for name in ("helix.json", "helix.json.sha256"):
        (stock / "release" / name).unlink()
    assert config_of("--rotary-base 5", stock).run.model.rotary_base == 5
    learned, *_ = models("gpt2")
    with pytest.raises(HelixError, match=r"--max-position-embeddings 128: .* model with 64"):
        config_of("--max-position-embeddings 128", learned)


WRONG = [
    (
        "qwen3",
        4,
        "--tensor-model-parallel-size 2",
        r"2 and 4 ranks: .*Start 2 ranks \(--nproc-per-node 2",
    ),
    ("qwen3", 3, "", r"cannot be dealt to 3 .* Valid numbers of ranks up to 5: 1, 2, 4"),
    ("qwen3", 2, "--intra-head-parallel-size 4", "does not divide the tensor parallel size 2"),
    ("qwen3", 64, "", r"4 query and 2 key-value heads of 16 dimensions cannot be dealt to 64"),
    ("llama 2", 32, "", r"cannot be dealt to 32 tensor parallel ranks, whole or cut"),
    ("wide", 2, "", r"47 columns \(ffn_hidden_size\) cannot be cut for 2"),
    ("qwen3", 2, "--expert-model-parallel-size 2", "the model has no experts"),
    (
        "qwen3",
        1,
        "--ckpt-step 5",
        r"--ckpt-step 5 chooses among .* holds one model \(huggingface\)",
    ),
    ("hunyuan", 1, "--implementation megatron", "does not compute models of type hunyuan"),
    ("qwen2 moe", 4, "--expert-model-parallel-size 3", "4 experts cannot be dealt evenly to 3"),
]


@pytest.mark.parametrize(("name", "ranks", "command", "text"), WRONG)
def test_what_does_not_fit_is_told_before_a_rank_starts(models, name, ranks, command, text):
    """With the valid values, in one place, and not from inside Megatron."""
    if name == "wide":  # a size that no model of the families' has
        flags = {
            "num_layers": 1,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "padded_vocab_size": 8,
        }
        odd = ModelConfig.from_flags(flags | {"ffn_hidden_size": 47})
        with pytest.raises(HelixError, match=text):
            RankLayout(odd.to_flags(), ranks)
        return
    with pytest.raises(HelixError, match=text):
        config_of(command, models(name)[0], ranks)


def test_newest_or_the_iteration_asked_for(models, tmp_path):
    """`--ckpt-step` as in training."""
    store = convert(models("qwen3")[0], tmp_path / "store", "--to canonical")
    assert config_of("", store).load_path == str(store / "release")
    with pytest.raises(HelixError, match="holds no complete checkpoint"):
        config_of("--ckpt-step 7", store)


def test_the_flags_are_known_without_torch():
    """`helix generate --help` must answer at once."""
    program = """
import argparse
from helix_megatron.inference.arguments import add_checkpoint_arguments
text = add_checkpoint_arguments(argparse.ArgumentParser()).format_help()
assert "--intra-head-parallel-size" in text and "--rotary-base" in text and "--seq-length" not in text
"""
    assert printed_afresh(program) == ["[]"]
