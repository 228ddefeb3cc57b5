"""Checkpoints of training: any layout saves, any other loads, and a resumed run goes on as if never stopped."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path

import pytest
import torch
from pool import RankError
from tiers import is_full
from training_runs import BASE, EP, PP, TP, M, run

from helix_megatron.checkpoint.store import Store
from helix_megatron.training.arguments import parse_args
from helix_megatron.training.validate import validate

CP = "--context-parallel-size"
ZERO1 = "--use-distributed-optimizer"
GQA = "--group-query-attention --num-query-groups 2"
BIASES = f"{GQA} --add-qkv-bias --rotary-percent 0.5 --kv-channels 16"
QK_NORM = (
    f"{GQA} --qk-layernorm --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --bf16"
)
EXPERTS = (
    "--num-experts 4 --moe-ffn-hidden-size 32 --swiglu --disable-bias-linear "
    "--moe-shared-expert-intermediate-size 16"
)
MIXED = "--num-layers 4 --num-experts 4 --moe-layer-freq 2 --disable-bias-linear --moe-ffn-hidden-size 32"

# name: (model, (ranks, layout) that saves, (ranks, layout) that loads it and saves)
PAIRS = {
    "dense: (2,2) → (4,1)": ("", (4, f"{TP} 4 {M} 2"), (4, f"{TP} 4")),
    "dense: (2,2) → (1,4)": ("", (4, f"{TP} 4 {M} 2"), (4, f"{TP} 4 {M} 4 --sequence-parallel")),
    "dense: (2,2) → one process": ("", (4, f"{TP} 4 {M} 2"), (1, "")),
    "dense: one process → (2,2), PP 2": ("", (1, ""), (8, f"{TP} 4 {M} 2 {PP} 2")),
    "dense, ZeRO-1: (2,1), DP 2 → (1,2), DP 1": (
        ZERO1,
        (4, f"{TP} 2"),
        (2, f"{TP} 2 {M} 2"),
    ),
    "GQA: (2,2) → (1,2), DP 2": (GQA, (4, f"{TP} 4 {M} 2"), (4, f"{TP} 2 {M} 2")),
    "GQA, ZeRO-1: (2,4) → (1,2), DP 2, PP 2": (
        f"{GQA} {ZERO1}",
        (8, f"{TP} 8 {M} 4"),
        (8, f"{TP} 2 {M} 2 {PP} 2"),
    ),
    "GQA, queries cut → queries whole": (
        GQA,
        (4, f"{TP} 4 {M} 2 --helix-query-layout segments"),
        (4, f"{TP} 4 {M} 2 --helix-query-layout heads"),
    ),
    "biases, part rotated: (2,2) → (1,4)": (BIASES, (4, f"{TP} 4 {M} 2"), (4, f"{TP} 4 {M} 4")),
    "biases, part rotated: (2,2) → (1,4), PP 2": (
        BIASES,
        (4, f"{TP} 4 {M} 2"),
        (8, f"{TP} 4 {M} 4 {PP} 2"),
    ),
    "QK-norm, bf16: (2,2) → (2,1), DP 2": (QK_NORM, (4, f"{TP} 4 {M} 2"), (4, f"{TP} 2")),
    "QK-norm, bf16, ZeRO-1: (1,2), DP 2 → (2,2)": (
        f"{QK_NORM} {ZERO1}",
        (4, f"{TP} 2 {M} 2"),
        (4, f"{TP} 4 {M} 2 --sequence-parallel"),
    ),
    "GQA, ZeRO-1: (1,2), CP 2 → CP 2, DP 2": (
        f"{GQA} {ZERO1}",
        (4, f"{TP} 2 {M} 2 {CP} 2"),
        (4, f"{CP} 2"),
    ),
    "experts, ZeRO-1: (1,2), CP 2, EP 2 → (2,2)": (
        f"{EXPERTS} {ZERO1}",
        (4, f"{TP} 2 {M} 2 {CP} 2 --sequence-parallel {EP} 2"),
        (4, f"{TP} 4 {M} 2 --sequence-parallel"),
    ),
    "experts: (2,2), EP 2 → (1,2), EP 1, DP 2": (
        EXPERTS,
        (4, f"{TP} 4 {M} 2 --sequence-parallel {EP} 2"),
        (4, f"{TP} 2 {M} 2 --sequence-parallel"),
    ),
    "experts, ZeRO-1: (1,2), EP 2, DP 2 → (2,2), EP 4": (
        f"{EXPERTS} {ZERO1}",
        (4, f"{TP} 2 {M} 2 --sequence-parallel {EP} 2"),
        (4, f"{TP} 4 {M} 2 --sequence-parallel {EP} 4"),
    ),
    "every second layer experts: one process → (2,2), PP 2, EP 2": (
        MIXED,
        (1, ""),
        (8, f"{TP} 4 {M} 2 --sequence-parallel {PP} 2 {EP} 2"),
    ),
}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, read by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    reader = FileSystemReader(directory)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        key: torch.full(entry.size, 77, dtype=entry.properties.dtype)
        for key, entry in entries
        if hasattr(entry, "size")
    }
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_tensors(directory: Path, other: Path) -> None:
    ours, theirs = tensors_of(directory), tensors_of(other)
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    assert not different
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in ours)
    assert all(bool(tensor.any()) for key, tensor in ours.items() if "exp_avg_sq" in key)


def losses(records: list[dict[str, float]]) -> list[float]:
    return [record["lm_loss"] for record in records]


FULL_PAIRS = {
    "dense: (2,2) → (1,4)",
    "GQA: (2,2) → (1,2), DP 2",
    "dense: (2,2) → (4,1)",
    "dense: one process → (2,2), PP 2",
    "GQA, ZeRO-1: (2,4) → (1,2), DP 2, PP 2",
    "biases, part rotated: (2,2) → (1,4), PP 2",
    "experts, ZeRO-1: (1,2), CP 2, EP 2 → (2,2)",
    "QK-norm, bf16: (2,2) → (2,1), DP 2",
    "experts, ZeRO-1: (1,2), EP 2, DP 2 → (2,2), EP 4",
}


def cases(names, of_full_tier):
    """The names as parameters of a test, some of which belong to the full tier."""
    mark = pytest.mark.full("checkpoints")
    assert set(of_full_tier) <= set(names), "a case was renamed"
    return [pytest.param(name, marks=[mark] * (name in of_full_tier)) for name in names]


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory):
    """A directory with the checkpoint of iteration 2 of a model at a layout, saved once."""

    @functools.cache
    def save(model: str, ranks: int = 1, layout: str = "") -> Path:
        directory = tmp_path_factory.mktemp("saved")
        run(pool, f"{BASE} {model} {layout} --save {directory}", ranks)
        return directory

    return save


@pytest.mark.parametrize("name", cases(PAIRS, FULL_PAIRS))
def test_round_trips_are_bit_exact(pool, tmp_path, saved, name):
    """A checkpoint depends on no layout: loaded at another and saved again, every tensor has the same bits."""
    model, (ranks, layout), (other_ranks, other_layout) = PAIRS[name]
    first, second = saved(model, ranks, layout), tmp_path / "second"
    run(pool, f"{BASE} {model} {other_layout} --load {first} --save {second}", other_ranks)
    start = Store(first).resolve()
    assert start.name == "iter_0000002"
    assert_same_tensors(start, Store(second).resolve())
    if is_full("checkpoints"):  # and back
        run(pool, f"{BASE} {model} {layout} --load {second} --save {tmp_path / 'third'}", ranks)
        assert_same_tensors(start, Store(tmp_path / "third").resolve())


DROPOUT = "--hidden-dropout 0.1 --attention-dropout 0.1"
RESUMED = {
    "one process, dropout": (f"{DROPOUT}", 1, ""),
    "(2,2), dropout": (DROPOUT, 4, f"{TP} 4 {M} 2 --helix-exchange gather-qk"),
    "(1,2), PP 2, DP 2, ZeRO-1, bf16": ("--bf16", 8, f"{TP} 2 {M} 2 {PP} 2 {ZERO1}"),
    "(1,2), DP 2, fp16": ("--fp16 --initial-loss-scale 65536", 4, f"{TP} 2 {M} 2"),
    "experts, (1,2), EP 2, DP 2, ZeRO-1": (
        EXPERTS,
        4,
        f"{TP} 2 {M} 2 --sequence-parallel {EP} 2 {ZERO1}",
    ),
    "SGD, virtual stages": (
        "--num-layers 4 --optimizer sgd",
        4,
        f"{TP} 2 {M} 2 {PP} 2 --num-layers-per-virtual-pipeline-stage 1",
    ),
}


WAYS = {f"{name}{way}": (name, way) for name in RESUMED for way in ("", " --async-save")}
FULL_WAYS = set(WAYS) - {
    "one process, dropout",
    "one process, dropout --async-save",
    "(2,2), dropout",
    "(1,2), DP 2, fp16",
    "experts, (1,2), EP 2, DP 2, ZeRO-1 --async-save",
}


@pytest.fixture(scope="module")
def straight(pool):
    """A run that was never stopped, once for each set of flags."""
    return functools.cache(lambda flags, ranks: run(pool, flags, ranks))


@pytest.mark.parametrize("way", cases(WAYS, FULL_WAYS))
def test_a_resumed_run_continues_bit_for_bit(pool, tmp_path, straight, way):
    """Stopped and resumed at the same layout, nothing shows that it stopped: losses, norms, learning rate."""
    name, asynchronous = WAYS[way]
    model, ranks, layout = RESUMED[name]
    flags = f"{BASE} --train-iters 6 {model} {layout}"
    keep = f"--save {tmp_path} --load {tmp_path} --save-interval 3 {asynchronous}"
    before = run(pool, f"{flags} {keep} --exit-interval 3", ranks)
    after = run(pool, f"{flags} {keep}", ranks)
    assert [record["iteration"] for record in before + after] == [1, 2, 3, 4, 5, 6]
    for key in ("lm_loss", "grad_norm", "learning_rate", "loss_scale", "consumed_samples"):
        expected = [record[key] for record in straight(flags, ranks)]
        assert [record[key] for record in before + after] == expected
    assert Store(tmp_path).complete() == [3, 6]


OTHERS = {
    "(2,2) → (1,4)": ("", 4, f"{TP} 4 {M} 2", 4, f"{TP} 4 {M} 4"),
    "one process → (1,2), PP 2, DP 2": ("", 1, "", 8, f"{TP} 2 {M} 2 {PP} 2"),
    "ZeRO-1, GQA: (2,2), DP 2 → (2,1)": (
        f"{GQA} {ZERO1}",
        8,
        f"{TP} 4 {M} 2",
        2,
        f"{TP} 2",
    ),
    "experts: (2,2), EP 2 → (1,2), EP 2, DP 2": (
        EXPERTS,
        4,
        f"{TP} 4 {M} 2 --sequence-parallel {EP} 2 --micro-batch-size 2",
        4,
        f"{TP} 2 {M} 2 --sequence-parallel {EP} 2 --micro-batch-size 2",
    ),
}


FULL_OTHERS = {"(2,2) → (1,4)", "ZeRO-1, GQA: (2,2), DP 2 → (2,1)"}


@pytest.mark.parametrize("name", cases(OTHERS, FULL_OTHERS))
def test_a_run_resumed_at_another_layout_keeps_its_losses(pool, tmp_path, name):
    """A job that gets other machines goes on with the same losses, to rounding, data included."""
    model, ranks, layout, other_ranks, other_layout = OTHERS[name]
    flags = f"{BASE} --train-iters 6 --hidden-dropout 0.1 {model}"
    straight = run(pool, f"{flags} {layout}", ranks)
    run(pool, f"{flags} {layout} --save {tmp_path} --exit-interval 3", ranks)
    after = run(pool, f"{flags} {other_layout} --load {tmp_path}", other_ranks)
    assert [record["iteration"] for record in after] == [4, 5, 6]
    for loss, expected in zip(losses(after), losses(straight)[3:], strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
    assert losses(straight)[5] < losses(straight)[0]


def test_what_a_checkpoint_holds(saved):
    """Keys and shapes are those of stock megatron-core; the manifest says what it is."""
    from helix_megatron.checkpoint.manifest import read_manifest

    directory = saved(GQA, 4, f"{TP} 4 {M} 2")
    path = Store(directory).resolve()
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(path).items()}
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (2, 64, 32)
    assert shapes["optimizer.state.exp_avg.decoder.layers.self_attention.linear_proj.weight"] == (
        2,
        32,
        32,
    )
    manifest = read_manifest(path)
    assert (manifest.kind, manifest.attention, manifest.iteration) == ("canonical", "exact", 2)
    assert manifest.model["num_query_groups"] == 2
    assert manifest.layout == {
        "tp": 4,
        "pp": 1,
        "dp": 1,
        "ep": 1,
        "cp": 1,
        "m": 2,
        "n": 2,
        "optimizer": "plain",
    }
    assert set(manifest.files) == {
        str(file.relative_to(path))
        for file in path.iterdir()
        if not file.name.startswith("helix.json")
    }
    assert (directory / "latest_checkpointed_iteration.txt").read_text().strip() == "2"


def test_finetuning_starts_anew_with_the_weights(pool, tmp_path):
    """--finetune takes weights, and neither optimizer nor iteration nor place in the data."""
    directory = tmp_path
    run(pool, f"{BASE} --save {directory} --save-interval 1")
    more = "--train-iters 3 --override-opt-param-scheduler"
    trained = run(pool, f"{BASE} {more} --load {directory}")
    tuned = run(pool, f"{BASE} --load {directory} --finetune --ckpt-step 1")
    assert [record["iteration"] for record in trained] == [3]
    assert [record["iteration"] for record in tuned] == [1, 2]
    fresh = run(pool, BASE)
    assert losses(tuned)[0] != losses(fresh)[0]


def test_the_model_comes_from_the_checkpoint(pool, saved, tmp_path):
    """--use-checkpoint-args makes the model's flags unnecessary; one given beside it wins, and is refused."""
    directory = saved(f"{GQA} --kv-channels 16 --add-qkv-bias")
    short = (
        "--seq-length 16 --micro-batch-size 1 --global-batch-size 4 --train-iters 3 --lr 3e-3 "
        f"--override-opt-param-scheduler --log-communication-time off --load {directory}"
    )
    records = run(pool, f"{short} --use-checkpoint-args {TP} 4 {M} 2", 4)
    assert [record["iteration"] for record in records] == [3]
    with pytest.raises(RankError, match="--kv-channels is 16 there and 8 here"):
        run(pool, f"{short} --use-checkpoint-args --kv-channels 8")


def test_without_optimizer_state(pool, tmp_path):
    """A checkpoint saved with --no-save-optim can be loaded, but not by accident."""
    run(pool, f"{BASE} --save {tmp_path} --no-save-optim --no-save-rng")
    with pytest.raises(RankError, match=r"holds weights and no optimizer state. Add no_load_optim"):
        run(pool, f"{BASE} --train-iters 3 --load {tmp_path}")
    records = run(pool, f"{BASE} --train-iters 3 --load {tmp_path} --no-load-optim")
    assert [record["iteration"] for record in records] == [3]


WRONG = {
    "--num-layers 3": "--num-layers is 2 there and 3 here",
    "--num-attention-heads 2": "--kv-channels is 8 there and 16 here; "
    "--num-attention-heads is 4 there and 2 here",
    "--swiglu": "--swiglu is False there and True here",
    "--vocab-size 300": "--vocab-size is 256 there and 300 here",
    ZERO1: "holds optimizer state of another kind",
    "--bf16": "holds optimizer state of another kind",
    "--lr 1e-2": "the learning-rate schedule differs from the checkpoint's",
    f"{TP} 2 {M} 2 --helix-attention segment-local": "holds ordinary weights, and this run has "
    "segment-local attention",
}


@pytest.mark.parametrize("flags", WRONG)
def test_another_model_is_refused(pool, saved, flags):
    """Loading what does not fit says which setting differs, on every rank, and does not train."""
    ranks = 2 if TP in flags else 1
    with pytest.raises(RankError, match=WRONG[flags]):
        run(pool, f"{BASE} {flags} --train-iters 3 --load {saved('')}", ranks)


def test_a_changed_schedule_is_taken_when_asked_for(pool, saved):
    """Training longer than planned is a new schedule, which must be said."""
    more = f"{BASE} --train-iters 4 --load {saved('')}"
    records = run(pool, f"{more} --override-opt-param-scheduler")
    assert [record["iteration"] for record in records] == [3, 4]
    kept = run(pool, f"{more} --use-checkpoint-opt-param-scheduler")
    assert kept[0]["learning_rate"] != records[0]["learning_rate"]


def test_a_changed_learning_rate_is_taken_when_asked_for(pool, saved):
    """Parameter groups carry the rates, too: the checkpoint's there, and this command's in the schedule, would
    go by the checkpoint's without a word."""
    more = f"{BASE} --train-iters 4 --lr-decay-style constant --load {saved('')}"
    taken = run(pool, f"{more} --lr 0.25 --override-opt-param-scheduler")
    assert taken[-1]["learning_rate"] == 0.25
    kept = run(pool, f"{more} --lr 0.25 --use-checkpoint-opt-param-scheduler")
    assert kept[-1]["learning_rate"] < 0.25


def test_segment_local_checkpoints_say_what_they_are(pool, tmp_path):
    """Its checkpoint is that of a model with m times the heads, at any n, and carries its name."""
    from helix_megatron.checkpoint.manifest import read_manifest

    local = f"{M} 2 --helix-attention segment-local"
    run(pool, f"{BASE} {TP} 4 {local} --save {tmp_path}", 4)
    manifest = read_manifest(Store(tmp_path).resolve())
    assert (manifest.attention, manifest.segments) == ("segment-local", 2)
    assert (manifest.model["num_attention_heads"], manifest.model["kv_channels"]) == (8, 4)
    more = f"{BASE} --train-iters 3 --override-opt-param-scheduler --load {tmp_path}"
    narrower = run(pool, f"{more} {TP} 2 {local}", 2)
    stock = run(pool, f"{more} --num-attention-heads 8 --kv-channels 4")
    assert losses(narrower) == pytest.approx(losses(stock), abs=1e-5)
    with pytest.raises(RankError, match="trained with segment-local attention of 2 segments"):
        run(pool, more)
    taken = f"--load {tmp_path} --use-checkpoint-args --helix-attention segment-local"
    taken_run = validate(parse_args(f"{taken} {TP} 4".split()), 4)
    assert (
        taken_run.model.num_attention_heads,
        taken_run.model.kv_channels,
        taken_run.helix.intra_head_parallel_size,
    ) == (4, 8, 2)


def test_ordinary_weights_in_segment_local_attention(pool, saved):
    """With both flags they load: segment j of a head becomes a head, at any layout the same model."""
    flags = (
        f"{BASE} --load {saved('')} --allow-quality-loss --finetune {M} 2 "
        "--helix-attention segment-local"
    )
    narrow, wide = run(pool, f"{flags} {TP} 2", 2), run(pool, f"{flags} {TP} 4", 4)
    assert losses(narrow) == pytest.approx(losses(wide), abs=1e-5)
    exact = run(pool, f"{BASE} --load {saved('')} --finetune {TP} 2 {M} 2", 2)
    assert abs(losses(narrow)[0] - losses(exact)[0]) > 1e-6, "another architecture"
    fresh = run(pool, f"{BASE} {M} 2 --helix-attention segment-local {TP} 2", 2)
    assert losses(narrow)[0] < losses(fresh)[0] - 0.1, "the weights are not new"


def test_every_damaged_file_is_found_before_a_tensor_is_used(pool, saved, tmp_path):
    """Each file in turn with a flipped byte, cut short, or gone: the error names it, on both ranks."""
    good = Store(saved("", 2, f"{TP} 2 {M} 2")).resolve()
    names = sorted(file.name for file in good.iterdir())
    assert len(names) >= 6
    damaged = [
        (name, damage)
        for name, damage in itertools.product(names, ("flip", "cut", "remove"))
        # Without its manifest it is no complete checkpoint, see test_store.py.
        if (name, damage) != ("helix.json", "remove")
    ]
    by_rank = pool.run(problems_of, str(good), str(tmp_path), damaged, world_size=2)
    assert by_rank[0] == by_rank[1]
    for (name, damage), problem in zip(damaged, by_rank[0], strict=True):
        assert name in problem, (name, damage, problem)


def problems_of(good: str, place: str, damaged: list[tuple[str, str]]) -> list[str]:
    """What verification, the first step of every load, says of a checkpoint with one file damaged."""
    import shutil

    import torch.distributed as dist

    from helix_megatron.errors import HelixError
    from helix_megatron.megatron import cpu_runtime, dist_checkpoint

    cpu_runtime.install()
    problems = []
    for name, damage in damaged:
        directory = Path(place, Path(good).name)
        if dist.get_rank() == 0:
            shutil.rmtree(directory, ignore_errors=True)
            shutil.copytree(good, directory)
            victim = directory / name
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 0x40
            kept = bytes(content) if damage == "flip" else bytes(content[: len(content) // 2])
            victim.unlink() if damage == "remove" else victim.write_bytes(kept)
        dist.barrier()
        try:
            dist_checkpoint.verify(directory)
            problems.append("nothing was found")
        except HelixError as error:
            problems.append(str(error))
        dist.barrier()
    return problems


def test_old_checkpoints_go(pool, tmp_path):
    """--keep keeps the newest."""
    run(pool, f"{BASE} --train-iters 5 --save {tmp_path} --save-interval 1 --keep 2")
    assert Store(tmp_path).complete() == [4, 5]
    assert sorted(os.listdir(tmp_path)) == [
        "iter_0000004",
        "iter_0000005",
        "latest_checkpointed_iteration.txt",
    ]


@pytest.mark.parametrize("asynchronous", ["", "--async-save"])
def test_a_full_disk_ends_the_run_and_keeps_what_there_was(pool, small_disk, asynchronous):
    """The error says how much is free; the checkpoint before is whole, and nothing half is left."""
    from helix_megatron.checkpoint.manifest import verify

    store = small_disk / "store"
    with pytest.raises(RankError, match=r"no space is left: .* of 1\.05 MB are free"):
        flags = f"{BASE} --train-iters 9 --save {store} --save-interval 1 --no-save-optim {asynchronous}"
        run(pool, f"{flags} {TP} 2 {M} 2", 2)
    complete = Store(store).complete()
    assert complete and complete[-1] < 9
    assert verify(Store(store).resolve()).iteration == complete[-1]
    assert not [path for path in store.iterdir() if "saving" in path.name]
