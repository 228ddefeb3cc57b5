"""A sharded model straight from a checkpoint of training equals that from its files, bit by bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import hf_models
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from helix_megatron import cli
from helix_megatron.checkpoint import manifest as manifests
from helix_megatron.checkpoint.canonical_io import CanonicalReader
from helix_megatron.checkpoint.rank_io import RankReader
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import from_pretrained, make_groups


def checkpoint_of(name: str, directory: Path, *options: str) -> tuple[str, str]:
    """A model in files, and the checkpoint that it was converted to."""
    if not (directory / "hf").exists():
        hf_models.save(name, directory / "hf")
    paths = str(directory / "hf"), str(directory / "-".join(("to", *options)))
    assert cli.main(["convert", *paths, "--to", *(options or ("canonical",))]) == 0
    return paths


def run_checkpoints(m: int, files: str, *checkpoints: str) -> list[tuple[list[str], set[int]]]:
    """Of each checkpoint: the weights that are others than in the files, and how often tensors were read."""
    groups = make_groups(dist.get_world_size(), m)

    def load(directory: str) -> Any:
        return from_pretrained(
            directory, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head
        )

    wanted, found = load(files).state_dict(), []
    for checkpoint in checkpoints:
        reads: Counter[str] = Counter()

        def counted(self: Any, name: str, read: Any, reads: Counter[str] = reads) -> torch.Tensor:
            reads[name] += 1
            return read(self, name)

        counting = {
            kind: functools.partialmethod(counted, read=kind.read)
            for kind in (CanonicalReader, RankReader)
        }
        with contextlib.ExitStack() as stack:
            for kind, read in counting.items():
                stack.enter_context(mock.patch.object(kind, "read", read))
            state = load(checkpoint).state_dict()
        assert state.keys() == wanted.keys()
        other = [name for name in wanted if not torch.equal(state[name], wanted[name])]
        found.append((other, set(reads.values())))
    return found


@pytest.mark.filterwarnings("ignore:each rank has", "ignore:.* stay whole on every rank")
@pytest.mark.parametrize(
    ("name", "m"),
    [
        pytest.param(name, m, marks=[pytest.mark.full("conversion")] * (name != "gpt oss"))
        for name, m in (
            *(("gpt oss", 2), ("mixtral", 2), ("llama4", 2), ("granitemoe", 2), ("phi3", 2)),
            *(("llama with biases, tied", 2), ("qwen3 5 moe", 2), ("nemotron h", 2)),
            *(("granite 4", 2), ("granite 4 with MLPs and one group", 2), ("bamba", 2)),
            *(("deepseek v2", 1), ("deepseek v3", 1)),
        )
    ],
)
def test_from_a_checkpoint(pool, tmp_path, name, m):
    """Stacked, fused and tied tensors too: every bit of the files, and each tensor is read once."""
    paths = checkpoint_of(name, tmp_path)
    assert pool.run(run_checkpoints, m, *paths, world_size=2) == [[([], {1})]] * 2


def test_from_every_kind_of_checkpoint(pool, tmp_path):
    """Files per rank of another layout and padding; and without a manifest, as stock Megatron writes one."""
    files, stock = checkpoint_of("qwen3", tmp_path)
    for name in ("helix.json", "helix.json.sha256"):
        (Path(stock) / "release" / name).unlink()
    cut = "ranks --tensor-model-parallel-size 4 --intra-head-parallel-size 2"
    _, ranks = checkpoint_of("qwen3", tmp_path, *f"{cut} --make-vocab-size-divisible-by 64".split())
    found = pool.run(run_checkpoints, 2, files, stock, ranks, world_size=2)
    assert found == [[([], {1})] * 2] * 2


def test_names_are_those_that_the_library_asks_for(pool, tmp_path):
    """Whatever those of the files were: here a tied model that was saved without its output layer."""
    hf_models.save("qwen3", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, tmp_path / "hf" / "model.safetensors")
    _, store = checkpoint_of("qwen3", tmp_path)
    found = pool.run(run_checkpoints, 2, str(tmp_path / "whole"), store, world_size=2)
    assert found == [[([], {1})]] * 2


def _flipped(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lost(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()


def _one_layer_more(checkpoint: Path) -> None:
    manifest = manifests.read_manifest(checkpoint)
    flags = manifest.model | {"num_layers": 3, "linear_attention_freq": [1, 0, 0]}
    manifests.write_manifest(checkpoint, dataclasses.replace(manifest, model=flags))


def run_load(checkpoint: str) -> str:
    groups = make_groups(2, 2)
    with pytest.raises(HelixError) as error:
        from_pretrained(checkpoint, 2, tensor_group=groups.tensor)
    return str(error.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flipped, "__0_0.distcp has changed"),
        (_lost, "__0_0.distcp is missing"),
        (_one_layer_more, "lacks decoder.layers.2."),
    ],
)
def test_damaged_checkpoints_are_named_by_all_ranks(pool, tmp_path, damage, said):
    """One rank alone compares files with the manifest, and the others must not wait for it."""
    _, store = checkpoint_of("qwen3 next", tmp_path)
    damage(Path(store) / "release")
    texts = pool.run(run_load, store, world_size=2)
    assert said in texts[0] and texts[0] == texts[1]
