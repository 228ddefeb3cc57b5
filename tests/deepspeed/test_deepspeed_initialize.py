"""`initialize` with the block: what it takes and refuses, and that without the block it is DeepSpeed's own."""

from __future__ import annotations

import inspect
import json
import types
import warnings
from typing import Any

import deepspeed_runs
import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import (
    ON_2,
    ON_4,
    TIMEOUT,
    Log,
    Run,
    build,
    configuration,
    error_of,
    start,
    step,
)

from helix_megatron.deepspeed import initialize
from helix_megatron.deepspeed.models import ModelParallelUnit


def test_the_signature_is_deepspeeds():
    """A script changes one import and nothing else; `others` takes what newer releases have besides."""
    import deepspeed

    def of(function: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(function).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert of(initialize) == [*of(deepspeed.initialize), ("others", inspect.Parameter.empty)]


# ------------------------------------------------------------------------ switched off


def train_without(block: dict[str, Any] | None, own: bool) -> tuple[Log, bytes, list[str]]:
    """Log, weights and the engine's own attributes, with DeepSpeed's `initialize` or Helix's."""
    start()
    import deepspeed

    function = initialize if own else deepspeed.initialize
    model = build("llama")
    config = configuration(Run(stage=1, helix=block))
    engine, optimizer, loader, scheduler = function(
        model=model, model_parameters=model.parameters(), config=config
    )
    assert optimizer is engine.optimizer and loader is None and scheduler is None
    log = [step(engine, number) for number in range(3)]
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return log, weights, sorted(vars(engine))


@pytest.mark.parametrize("block", [None, {}, {"intra_head_parallel_size": 1}])
def test_without_anything_to_cut_it_is_deepspeed(pool, block):
    """Same bits, and an engine with the same attributes: nothing was wrapped."""
    plain = pool.run(train_without, block, False, world_size=2, timeout=TIMEOUT)
    assert pool.run(train_without, block, True, world_size=2, timeout=TIMEOUT) == plain


def error_without_configuration() -> str:
    start()
    with pytest.raises(AssertionError) as error:
        initialize(model=torch.nn.Linear(1, 1))
    return str(error.value)


def test_what_deepspeed_says_without_a_configuration_stays_its_own(pool):
    """The block is no reason to meet other errors."""
    (text,) = pool.run(error_without_configuration, world_size=1, timeout=TIMEOUT)
    assert text == "DeepSpeed requires --deepspeed_config to specify configuration file"


# -------------------------------------------------------------------- what it takes


def train_otherwise(kind: str, directory: str) -> tuple[Log, list[int]]:
    """Three steps in one of several ways to call `initialize`; the ranks of this rank's data parallel group."""
    start()
    import deepspeed

    from helix_megatron.huggingface import make_groups, shard

    model = build("llama")
    config = configuration(Run(helix=ON_2, stage=1))
    call: dict[str, Any] = {"model": model, "config": config}
    if kind == "client optimizer":
        del config["optimizer"]
        call["optimizer"] = torch.optim.AdamW(model.parameters(), lr=deepspeed_runs.LEARNING_RATE)
    elif kind == "file":
        path = f"{directory}/{dist.get_rank()}.json"
        with open(path, "w") as file:
            json.dump(config, file)
        args = types.SimpleNamespace(deepspeed_config=path, local_rank=dist.get_rank())
        call = {"args": args, "model": model}
    elif kind == "mpu":
        groups = make_groups(2, 2)
        call["mpu"] = ModelParallelUnit(groups.tensor, groups.data)
    elif kind == "cut before":
        groups = make_groups(2, 2)
        shard(model, 2, tensor_group=groups.tensor)
        config["helix"] = {"intra_head_parallel_size": 2}
    elif kind == "wrapped":
        call["model"] = deepspeed_runs.Wrapped(model)
        call["model"].scale.requires_grad = False
    engine = initialize(**call)[0]
    if kind == "file":
        assert call["args"].deepspeed_config == path
    log = [step(engine, number) for number in range(3)]
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    return log, dist.get_process_group_ranks(engine.data_parallel_group)


@pytest.mark.parametrize(
    "kind", ["client optimizer", "file", "mpu", "cut before", "wrapped"]
)  # fmt: skip
def test_ways_to_call_it(pool, tmp_path, kind):
    """All train the same model on the same groups."""
    results = pool.run(train_otherwise, kind, str(tmp_path), world_size=4, timeout=TIMEOUT)
    reference = pool.run(
        deepspeed_runs.train, Run(helix=ON_2, stage=1, steps=3), world_size=4, timeout=TIMEOUT
    )
    assert [log for log, _ in results] == reference
    assert [ranks for _, ranks in results] == [[0, 2], [1, 3], [0, 2], [1, 3]]


class Sentences(torch.utils.data.Dataset):
    """Samples that say which they are."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index])


def indices_of_loader() -> list[int]:
    """What DeepSpeed's own loader gives this rank first."""
    start()
    model = build("llama")
    config = configuration(Run(helix=ON_2))
    loader = initialize(model=model, config=config, training_data=Sentences())[2]
    return next(iter(loader)).flatten().tolist()


@pytest.mark.full("training")
def test_deepspeeds_loader_deals_samples_to_replicas(pool):
    """Ranks that share a model get the same batch, replicas different ones."""
    by_rank = pool.run(indices_of_loader, world_size=4, timeout=TIMEOUT)
    assert by_rank[0] == by_rank[1] and by_rank[2] == by_rank[3]
    assert not set(by_rank[0]) & set(by_rank[2])
    assert len(by_rank[0]) == deepspeed_runs.SAMPLES // 2


# ---------------------------------------------------------------------- what it refuses


def errors_on_two_ranks() -> dict[str, str]:
    """Texts of the errors of wrong calls."""

    def call(block: Any = ON_2, settings: Any = None, **changes: Any) -> str:
        start()
        config = configuration(Run(helix=block, settings=settings or {}))
        model = changes.pop("model") if "model" in changes else build("llama")
        return error_of(initialize, **{"model": model, "config": config} | changes)

    def used_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.zeros(1, 4, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        return optimizer

    start()
    stepped, other, empty, cut = (build("llama") for _ in range(4))
    with torch.no_grad():
        other.lm_head.weight[0, 0] += dist.get_rank()
    empty.to("meta")
    from helix_megatron.huggingface import make_groups, shard

    shard(cut, 2, tensor_group=make_groups(2, 2).tensor)
    # As deepspeed.zero.Init leaves parameters, without its process-wide effects.
    dealt = build("llama")
    dealt.lm_head.weight.ds_id = 0
    whole_experts = deepspeed_runs.deepspeed_moe(enable_expert_tensor_parallelism=False)
    return {
        "world": call(ON_4),
        "key": call({"intra_head_parallel_sizes": 2}),
        "heads": call({"intra_head_parallel_size": 1, "tensor_parallel_size": 2, "query_layout": "segments"}
                      | {"exchange": "all-to-all"}, model=one_head()),
        "settings": call(settings={"tensor_parallel": {"autotp_size": 2}}),
        "file": call(config="missing.json"),
        "model": call(model=torch.nn.Linear(2, 2)),
        "no model": call(model=None),
        "mesh": call(mesh_param=(1, 2)),
        "optimizer": call(model=stepped, optimizer=used_optimizer(stepped)),
        "experts": call(model=build(whole_experts)),
        "dealt": call(model=dealt),
        "other weights": call(model=other),
        "no weights": call(model=empty),
        "cut otherwise": call(ON_2 | {"exchange": "score-reduce"}, model=cut),
        "mpu": call(mpu=object()),
    }  # fmt: skip


def one_head() -> torch.nn.Module:
    import transformers

    sizes = deepspeed_runs.SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


ERRORS = {
    "world": '"tensor_parallel_size" 4 in the block "helix" does not divide the 2 ranks of the world. '
    "Valid: 2.",
    "key": 'unknown key "intra_head_parallel_sizes" in the block',
    "heads": '1 head cannot form 2 head groups. Valid numbers of groups: 1. With 2 ranks try '
    '"intra_head_parallel_size": 2.',
    "settings": "AutoTP would cut the model a second time",
    "file": "the DeepSpeed configuration 'missing.json' cannot be read: ",
    "model": "cannot cut a Linear. Valid: a transformers model of a family",
    "no model": "initialize needs a model",
    "mesh": "mesh_param = (1, 2) does not go together",
    "optimizer": "the AdamW that was passed has made steps",
    "experts": "model.layers.0.mlp.moe has enable_expert_tensor_parallelism=False",
    "dealt": "was built under deepspeed.zero.Init",
    "other weights": "the ranks that share one model have different weights: lm_head.weight. Build it "
    "with the same seed",
    "no weights": "weight model.embed_tokens.weight is on the meta device and has no values",
    "cut otherwise": "the model was cut with exchange 'auto', and the block \"helix\" says 'score-reduce'",
    "mpu": "the mpu that was passed, of type object, has no get_tensor_model_parallel_group",
}  # fmt: skip


def test_errors_name_what_is_wrong_on_all_ranks(pool):
    """Before anything is cut, and on every rank alike: a rank that goes on would hang."""
    by_rank = pool.run(errors_on_two_ranks, world_size=2, timeout=TIMEOUT)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0].keys() == ERRORS.keys()
    for name, text in ERRORS.items():
        assert text in by_rank[0][name], name
        assert "--" not in by_rank[0][name], f"{name} speaks of flags"


def error_of_other_batches() -> str:
    """Each rank feeds a batch of its own, as a sampler over the world would."""
    engine = deepspeed_runs.build_engine(Run(helix=ON_2))
    ids = torch.full((1, 4), dist.get_rank())
    return error_of(engine, input_ids=ids, labels=ids)


def test_different_batches_on_ranks_of_one_model_are_refused(pool):
    """The most likely slip of all: everything runs, and the loss is of nothing."""
    texts = pool.run(error_of_other_batches, world_size=2, timeout=TIMEOUT)
    assert texts[0] == texts[1]
    assert texts[0].startswith("tensor parallel rank 1 was given another batch than rank 0")
    assert "engine.mpu.get_data_parallel_rank()" in texts[0]


def megatron_errors() -> dict[str, str]:
    """Texts for megatron-core models that do not fit the block."""
    from megatron.core.transformer import TransformerConfig

    flags = (
        "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 12 --train-iters 1 "
    )
    flags += "--micro-batch-size 4 --global-batch-size 4 --tensor-model-parallel-size 2"
    run = Run(model=f"{flags} --intra-head-parallel-size 2")
    start()
    model = deepspeed_runs.build_megatron(run)

    def call(block: dict[str, Any], **settings: Any) -> str:
        config = configuration(run.with_(helix=block, settings=settings))
        return error_of(initialize, model=model, config=config)

    texts = {
        "segments": call({"intra_head_parallel_size": 1, "tensor_parallel_size": 2}),
        "exchange": call({"intra_head_parallel_size": 2, "exchange": "score-reduce"}),
        "size": call({"intra_head_parallel_size": 2, "tensor_parallel_size": 4}),
        "zero 3": call({"intra_head_parallel_size": 2}, zero_optimization={"stage": 3}),
    }
    model.model.config.gradient_accumulation_fusion = True
    texts["fusion"] = call({"intra_head_parallel_size": 2})
    stock = torch.nn.Linear(2, 2)
    stock.config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
    model = stock
    return texts | {"stock": call({"intra_head_parallel_size": 2})}


def test_megatron_models_must_be_built_for_the_block(pool):
    """They are cut when they are built; what needs Megatron's own training loop is refused."""
    texts = pool.run(megatron_errors, world_size=2, timeout=TIMEOUT)
    assert texts[0] == texts[1]
    for name, text in {
        "segments": 'the model was built with intra_head_parallel_size 2, and the block "helix" says 1',
        "exchange": "the model was built with exchange 'auto', and the block \"helix\" says 'score-reduce'",
        "size": '"tensor_parallel_size" 4 in the block "helix" is not that of Megatron, 2',
        "zero 3": "ZeRO 3 does not work with megatron-core models",
        "fusion": "gradient_accumulation_fusion = True does not work under DeepSpeed",
        "stock": "has a TransformerConfig, which cannot say how attention is cut",
    }.items():
        assert text in texts[0][name], name


def warnings_of(run: Run) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        deepspeed_runs.build_engine(run)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def test_faults_of_deepspeed_that_stay_are_warned_of(pool):
    """They exist without Helix, too, but not everybody knows."""
    (texts, _) = pool.run(
        warnings_of, Run(helix=ON_2, precision="fp16"), world_size=2, timeout=TIMEOUT
    )
    assert any("has not multiplied the loss by it" in text for text in texts)
    (texts, _) = pool.run(
        warnings_of, Run(helix=ON_2, precision="fp16", stage=1), world_size=2, timeout=TIMEOUT
    )
    assert not any("loss scale" in text for text in texts)
