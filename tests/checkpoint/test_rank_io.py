"""One file per rank: real models load their own, and all of them give the canonical tensors back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import build, flags_of, whole_model
from torch import Tensor
from waiting import PROGRAM_LIMIT

from helix_megatron.checkpoint.catalog import catalog
from helix_megatron.checkpoint.partition import RankLayout
from helix_megatron.checkpoint.rank_io import LATEST, RankReader, StageFiles, file_name
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.run.local_ranks import reserved_port

ROOT = Path(__file__).parents[2]
CUT = (2, 2, 1, 2, 2)


def layout_of(model: str, sizes: tuple[int, ...], **others: Any) -> RankLayout:
    tp, pp, ep, etp, m = sizes
    return RankLayout(flags_of(model), tp, pp, ep, etp, HelixConfig(m), **others)


def write(
    folder: Path, layout: RankLayout, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Rank files of a whole model; its tensors."""
    folder.mkdir()
    whole = {name: value.to(dtype) for name, value in whole_model(dict(layout.flags)).items()}
    for stage in range(layout.pipeline):
        with StageFiles(folder, layout, stage, dict.fromkeys(whole, dtype)) as files:
            for tensor in files.tensors:
                files.write(tensor, whole[tensor.name])
    return whole


def load_own_file(
    flags: dict[str, Any], sizes: tuple[int, ...], world_size: int, folder: str
) -> list[str]:
    """Names of this rank's weights that its file gives other values than they should have."""
    from megatron.core import parallel_state as mpu

    from helix_megatron.megatron.fill import fill_weights

    model = build(flags, sizes, "auto", world_size)
    tp, pp, ep, etp, m = sizes
    layout = RankLayout(flags, tp, pp, ep, etp, HelixConfig(m))
    here = (
        mpu.get_pipeline_model_parallel_rank(),
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_expert_model_parallel_rank(),
        mpu.get_expert_tensor_parallel_rank(),
    )
    places = {tuple(vars(layout.place(rank)).values()): rank for rank in range(layout.num_ranks)}
    state = torch.load(Path(folder) / file_name(places[here]), weights_only=True)
    model.load_state_dict(state["module"])  # strict
    loaded = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    fill_weights(model, whole_model(flags).__getitem__)
    expected = model.state_dict()
    return [name for name, value in loaded.items() if not value.equal(expected[name])]


CASES = [
    ("gqa", CUT, 4),
    ("dense", (2, 2, 1, 2, 1), 4),
    ("experts", (2, 1, 2, 1, 2), 2),
    ("every other layer has experts", (2, 2, 1, 2, 2), 4),
]


@pytest.mark.parametrize(("model", "sizes", "world_size"), CASES)
def test_each_rank_loads_its_file(pool, tmp_path, model, sizes, world_size):
    """Strictly, with torch.load(weights_only=True) alone, as a program without this package would."""
    write(tmp_path / "ranks", layout_of(model, sizes))
    wrong = pool.run(
        load_own_file,
        flags_of(model),
        sizes,
        world_size,
        str(tmp_path / "ranks"),
        world_size=world_size,
    )
    assert wrong == [[]] * world_size


@pytest.mark.parametrize(
    ("model", "sizes", "dtype"),
    [
        ("gqa", CUT, torch.bfloat16),
        ("qk norm, gates, partial rotary", (4, 1, 1, 4, 4), torch.float32),
        ("positions", (1, 4, 1, 1, 1), torch.float16),
        ("experts", (2, 2, 4, 1, 1), torch.float32),
        ("every other layer has experts", (4, 1, 2, 2, 2), torch.float32),
    ],
)
def test_files_give_the_canonical_tensors_back(tmp_path, model, sizes, dtype):
    """Bit for bit, with the padding of the vocabulary gone."""
    layout = layout_of(model, sizes, vocabulary_multiple=16)
    whole = write(tmp_path / "ranks", layout, dtype)
    reader = RankReader(tmp_path / "ranks", layout)
    assert reader.names == list(whole)
    for name, value in whole.items():
        assert (reader.shape(name), reader.dtype(name)) == (value.shape, dtype)
        assert reader.read(name).equal(value), name


DEEPSPEED = """
import os, sys, torch
sys.path[:0] = sys.argv[3:]
os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
from helix_megatron.deepspeed.cpu import use_cpu
use_cpu()  # compiles nothing
import deepspeed
model = torch.nn.Module()
state = torch.load(os.path.join(sys.argv[1], "step7", "mp_rank_00_model_states.pt"), weights_only=True)
for name, value in state["module"].items():
    if value is not None:
        model.register_parameter(name.replace(".", "/"), torch.nn.Parameter(torch.zeros_like(value)))
rename = lambda names: {name.replace(".", "/"): value for name, value in names.items() if value is not None}
deepspeed.init_distributed("gloo")
config = {"train_batch_size": 1, "zero_optimization": {"stage": 0}}
engine, *_ = deepspeed.initialize(model=model, config=config)
def fill(src, dst):
    dst.load_state_dict(rename(src))
path, _ = engine.load_checkpoint(sys.argv[1], load_module_only=True, custom_load_fn=fill)
assert path.endswith("mp_rank_00_model_states.pt"), path
assert engine.global_steps == 0
expected = rename(state["module"])
assert all(value.equal(expected[name]) for name, value in model.state_dict().items())
print("loaded", len(expected))
"""


def test_deepspeed_loads_them(tmp_path):
    """`engine.load_checkpoint(DIR, load_module_only=True)` of the real engine finds all that it asks for."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install deepspeed)")
    layout = layout_of("gqa", (1, 1, 1, 1, 1))
    folder = tmp_path / "ranks"
    folder.mkdir()
    whole = write(folder / "step7", layout)
    (folder / LATEST).write_text("step7")
    with reserved_port() as port:
        run = subprocess.run(
            [sys.executable, "-c", DEEPSPEED, str(folder), str(port)],
            capture_output=True,
            text=True,
            timeout=PROGRAM_LIMIT,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    assert f"loaded {len(whole)}" in run.stdout, run.stderr[-3000:]


def change(path: Path, name: str, change: Any) -> None:
    """Write a rank's file anew with one tensor changed; None removes it."""
    state = torch.load(path, weights_only=True)
    value = change(state["module"].pop(name))
    if value is not None:
        state["module"][name] = value
    torch.save(state, path)


def test_ranks_that_disagree_are_named(tmp_path):
    """Replicated tensors of ranks that went astray: no average and no first one, but an error."""
    layout = layout_of("gqa", CUT)
    write(tmp_path / "ranks", layout)
    name = "decoder.layers.0.input_layernorm.weight"
    change(tmp_path / "ranks" / file_name(1), name, lambda value: value + 1)
    reader = RankReader(tmp_path / "ranks", layout)
    with pytest.raises(HelixError) as error:
        reader.read("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight")
    for part in ("linear_qkv.layer_norm_weight", "mp_rank_00", "mp_rank_01"):
        assert part in str(error.value)
    assert reader.read("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight").numel()


def test_copies_of_the_embedding_must_agree(tmp_path):
    """The last stage has one of its own when embeddings are tied."""
    layout = layout_of("gqa", CUT)
    write(tmp_path / "ranks", layout)
    change(tmp_path / "ranks" / file_name(3), "output_layer.weight", lambda value: -value)
    with pytest.raises(HelixError, match=r"word_embeddings.weight must be equal in .*01.*03"):
        RankReader(tmp_path / "ranks", layout).read("embedding.word_embeddings.weight")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda value: None, "lacks decoder.layers.0.mlp.linear_fc2.weight"),
        (lambda value: value[:, :3], r"of shape \[32, 3\], and the layout makes it \[32, 24\]"),
        (lambda value: value.half(), "is torch.float16 in mp_rank_01"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, wrong, text):
    """A file of another model or layout."""
    layout = layout_of("gqa", CUT)
    write(tmp_path / "ranks", layout)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    change(tmp_path / "ranks" / file_name(1), name, wrong)
    with pytest.raises(HelixError, match=text):
        RankReader(tmp_path / "ranks", layout).read(name)


def test_missing_and_surplus_files_are_named(tmp_path):
    """The number of files is that of the layout."""
    layout = layout_of("gqa", CUT)
    write(tmp_path / "ranks", layout)
    with pytest.raises(HelixError, match=r"has 4 rank files.*2 tensor × 1 pipeline .* has 2 files"):
        RankReader(tmp_path / "ranks", layout_of("gqa", (2, 1, 1, 2, 2)))
    (tmp_path / "ranks" / file_name(2)).unlink()
    with pytest.raises(HelixError, match=r"lacks mp_rank_02_model_states.pt"):
        RankReader(tmp_path / "ranks", layout)
    torch.save({"weights": {}}, tmp_path / "ranks" / file_name(2))
    with pytest.raises(HelixError, match="has no 'module'"):
        RankReader(tmp_path / "ranks", layout).read("decoder.final_layernorm.weight")


def test_latest_may_not_lead_elsewhere(tmp_path):
    """`latest` is a file of the checkpoint: it names a directory in it, or the checkpoint is refused."""
    layout = layout_of("gqa", CUT)
    write(tmp_path / "ranks", layout)
    for tag in ("../elsewhere", "", "/etc", "gone"):
        (tmp_path / LATEST).write_text(tag)
        with pytest.raises(HelixError, match="latest names"):
            RankReader(tmp_path, layout)
    (tmp_path / LATEST).write_text("ranks\n")
    assert RankReader(tmp_path, layout).names


def test_a_file_is_read_by_anyone(tmp_path):
    """The bytes are torch.save's format: loaded mapped or not, and as large as the rank's part."""
    layout = layout_of("gqa", (2, 1, 1, 2, 2))
    write(tmp_path / "ranks", layout)
    path = tmp_path / "ranks" / file_name(0)
    for mmap in (False, True):
        state = torch.load(path, weights_only=True, mmap=mmap)
        assert state["mp_world_size"] == 2
        assert {"dp_world_size", "global_steps", "skipped_steps"} <= state.keys()
    part = sum(v.nbytes for v in state["module"].values() if v is not None)
    assert part < path.stat().st_size < part + 20_000
    whole = sum(tensor.numel for tensor in catalog(layout.flags)) * 4
    assert part < 0.6 * whole
