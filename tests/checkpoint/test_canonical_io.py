"""Canonical checkpoints: what is written stock megatron-core loads, and what it saves is read."""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_checkpoints import BASE, EXPERTS, GQA, build, flags_of, value_of, whole_model
from torch import Tensor

from helix_megatron.checkpoint import safe
from helix_megatron.checkpoint.canonical_files import (
    CanonicalFile,
    all_objects,
    empty_state,
    write_common,
    write_metadata,
)
from helix_megatron.checkpoint.canonical_io import CanonicalReader
from helix_megatron.checkpoint.catalog import catalog
from helix_megatron.errors import HelixError

ONE = (1, 1, 1, 1, 1)


def write(folder: Path, flags: dict[str, Any], tensors: dict[str, Tensor], files: int = 2) -> Path:
    """A canonical checkpoint in `files` files."""
    folder.mkdir(parents=True)
    places: dict[str, Any] = {}
    objects: dict[str, Any] = {}
    entries = catalog(flags)
    for number in range(files):
        name = f"__0_{number}.distcp"
        with CanonicalFile(folder / name) as file:
            if number == 0:
                empty = empty_state()
                objects = {key: (name, file.add_object(empty)) for key in all_objects(flags)}
            for tensor in entries[number::files]:
                value = tensors[tensor.name][(None,) * len(tensor.leading)]
                places[tensor.name] = name, file.add(value)
            file.finish()
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    write_metadata(folder, flags, places, objects, dtypes)
    write_common(folder, flags, 0)
    return folder


def load_in_megatron(
    flags: dict[str, Any], sizes: tuple[int, ...], world_size: int, directory: str
) -> list[str]:
    """Names of weights that megatron-core loads from a directory and that are not the model's."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from helix_megatron.megatron.fill import fill_weights

    model = build(flags, sizes, "auto", world_size)
    groups = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    sharded = model.sharded_state_dict(metadata=groups)
    asked = {item.key for item in nested_values(sharded) if hasattr(item, "key")}
    state = dist_checkpointing.load({"model": sharded}, directory)  # raises for what is absent
    stored = safe.load_metadata(Path(directory, ".metadata")).state_dict_metadata
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, asked)
    unused = {key.partition("/shard_")[0] for key in stored}.difference(*everyone)
    # What Transformer Engine's layers would ask for, and local ones do not.
    assert all(key.endswith("core_attention._extra_state") for key in unused), unused
    loaded = {k: v.clone() for k, v in state["model"].items() if isinstance(v, Tensor)}
    assert state["args"].num_layers == flags["num_layers"]
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
    model.load_state_dict(state["model"])  # strict
    whole = whole_model(flags)
    fill_weights(model, whole.__getitem__)
    expected = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    assert loaded.keys() == expected.keys()
    return [name for name, value in expected.items() if not value.equal(loaded[name])]


def save_in_megatron(
    flags: dict[str, Any], sizes: tuple[int, ...], world_size: int, directory: str
) -> None:
    """Save a model filled with `whole_model`, as stock megatron-core does."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as mpu

    from helix_megatron.megatron.fill import fill_weights

    model = build(flags, sizes, "segments" if sizes[-1] > 1 else "auto", world_size)
    fill_weights(model, whole_model(flags).__getitem__)
    groups = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=groups)}, directory)


LOADED = [
    ("gqa", ONE, 1),
    ("qk norm, gates, partial rotary", (2, 2, 1, 2, 2), 4),
    ("experts", (2, 1, 2, 1, 2), 2),
    ("every other layer has experts", ONE, 1),
    ("positions", (2, 1, 1, 2, 1), 2),
]


@pytest.mark.parametrize(("model", "sizes", "world_size"), LOADED)
def test_megatron_loads_what_is_written(pool, tmp_path, model, sizes, world_size):
    """Strictly: no key that the model asks for is missing, objects included, and every value is right."""
    flags = flags_of(model)
    folder = write(tmp_path / "written", flags, whole_model(flags))
    ranks = pool.run(load_in_megatron, flags, sizes, world_size, str(folder), world_size=world_size)
    assert ranks == [[]] * world_size
    safe.inspect(folder)  # and nothing in it looks hostile


@pytest.mark.parametrize(("model", "sizes", "world_size"), LOADED[:4])
def test_what_megatron_saves_is_read(pool, tmp_path, model, sizes, world_size):
    """Every tensor whole, put together from the pieces of all ranks."""
    flags = flags_of(model)
    folder = tmp_path / "saved"
    folder.mkdir()
    pool.run(save_in_megatron, flags, sizes, world_size, str(folder), world_size=world_size)
    reader = CanonicalReader(folder, flags)
    assert reader.names == [tensor.name for tensor in catalog(flags)]
    for name, value in whole_model(flags).items():
        assert (reader.shape(name), reader.dtype(name)) == (value.shape, value.dtype)
        assert reader.read(name).equal(value), name


def is_mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is a file of the folder."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


def test_written_and_read_dtypes(tmp_path):
    """Bits must survive in every floating-point dtype; a tensor that is mapped is right at any alignment."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        tensors = {name: value.to(dtype) for name, value in whole_model(BASE).items()}
        folder = write(tmp_path / str(dtype), BASE, tensors)
        reader = CanonicalReader(folder, BASE)
        for name, value in tensors.items():
            got = reader.read(name)
            assert got.dtype == dtype
            assert got.view(torch.uint8).equal(value.view(torch.uint8)), name
            assert is_mapped(got, folder), "not mapped: reading is slow"


def test_a_written_tensor_is_let_go(tmp_path):
    """torch's own writer keeps every tensor of a file: a conversion would need the memory of the model."""
    with CanonicalFile(tmp_path / "file") as file:
        tensor = torch.zeros(1, 1000)
        alive = weakref.ref(tensor)
        file.add(tensor)
        del tensor
        assert alive() is None


def test_a_view_is_written_without_what_it_is_a_view_of(tmp_path):
    """torch.save writes whole storages: a small part of a mapped model would become the model."""
    with CanonicalFile(tmp_path / "file") as file:
        _, size = file.add(torch.zeros(1000, 1000)[:1, :10])
    assert size < 10_000


def test_files_are_the_same_each_time(tmp_path, monkeypatch):
    """Hashes tell copies of a model apart: no clock may go into a file."""
    for year in (2001, 2002):
        monkeypatch.setattr(time, "localtime", lambda *_, year=year: (year, 1, 1, 0, 0, 0, 0, 1, 0))
        write(tmp_path / str(year), BASE, whole_model(BASE))
    for name in ("__0_0.distcp", "__0_1.distcp"):
        assert (tmp_path / "2001" / name).read_bytes() == (tmp_path / "2002" / name).read_bytes()


def dcp_save(folder: Path, state: dict[str, Tensor]) -> Path:
    """By torch alone, one process."""
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_other_spellings_are_read(tmp_path):
    """Checkpoints of DDP-wrapped models, and Transformer Engine's norm of MoE layers."""
    flags = BASE | EXPERTS | {"moe_layer_freq": 2}
    state = {}
    for tensor in catalog(flags):
        key = tensor.key
        if tensor.layer == 0:
            key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
        whole = state.setdefault(f"module.{key}", torch.zeros(tensor.global_shape))
        whole[tensor.leading] = torch.from_numpy(value_of(tensor))
    reader = CanonicalReader(dcp_save(tmp_path / "saved", state), flags)
    for name, value in whole_model(flags).items():
        assert reader.read(name).equal(value), name


def test_transposed_storages_are_read(tmp_path):
    """A tensor's bytes may lie in another order than its elements: then it cannot be mapped."""
    state = {}
    for tensor in catalog(BASE):
        whole = state.setdefault(tensor.key, torch.zeros(tensor.global_shape))
        whole[tensor.leading] = torch.from_numpy(value_of(tensor))
    key = "embedding.word_embeddings.weight"
    state[key] = state[key].t().contiguous().t()
    reader = CanonicalReader(dcp_save(tmp_path / "saved", state), BASE)
    assert not is_mapped(reader.read(key), tmp_path)
    for name, value in whole_model(BASE).items():
        assert reader.read(name).equal(value), name


def test_another_model_is_refused(tmp_path):
    """Shapes and names are compared before the first tensor is read."""
    folder = write(tmp_path / "written", BASE, whole_model(BASE))
    with pytest.raises(
        HelixError, match=r"has .*linear_qkv.weight of shape .* and the model flags say"
    ):
        CanonicalReader(folder, BASE | GQA)
    with pytest.raises(HelixError, match=r"lacks output_layer.weight"):
        CanonicalReader(folder, BASE | {"untie_embeddings_and_output_weights": True})


def test_layers_of_two_dtypes_cannot_be_stacked(tmp_path):
    """The format has one dtype for all layers: better an error than weights reinterpreted."""
    tensors = whole_model(BASE)
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    tensors[name] = tensors[name].half()
    with pytest.raises(
        HelixError, match=r"layers.2.mlp.linear_fc2.weight is torch.float16 and .*dtype="
    ):
        write(tmp_path / "written", BASE, tensors)


def test_missing_files_and_pieces_are_named(tmp_path):
    """Without a manifest nothing else would tell."""
    folder = write(tmp_path / "written", BASE, whole_model(BASE))
    path = folder / "__0_1.distcp"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(HelixError, match=r"__0_1.distcp is truncated"):
        CanonicalReader(folder, BASE)
    path.unlink()
    with pytest.raises(HelixError, match=r"__0_1.distcp is missing"):
        CanonicalReader(folder, BASE)
    path.write_bytes(content)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = "decoder.layers.mlp.linear_fc1.weight"
    metadata.state_dict_metadata[key].chunks.pop(2)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    reader = CanonicalReader(folder, BASE)
    with pytest.raises(HelixError, match=r"lists 0 of the 1536 elements of decoder.layers.2"):
        reader.read("decoder.layers.2.mlp.linear_fc1.weight")


def test_damage_inside_a_piece_is_an_error_or_other_bits(tmp_path):
    """Flipping a byte must never crash with a traceback; what it does not tell, a manifest's hash does."""
    folder = write(tmp_path / "written", BASE, whole_model(BASE), files=1)
    path = folder / "__0_0.distcp"
    content = path.read_bytes()
    name = "decoder.final_layernorm.bias"
    reader = CanonicalReader(folder, BASE)
    place = next(p for i, p in reader._storage.items() if i.fqn == name)
    outcomes = set()
    for offset in itertools.chain(range(place.offset, place.offset + place.length, 7)):
        damaged = bytearray(content)
        damaged[offset] ^= 0xFF
        path.write_bytes(damaged)
        try:
            same = CanonicalReader(folder, BASE).read(name).equal(whole_model(BASE)[name])
            outcomes.add("same" if same else "other")
        except HelixError as error:
            assert name in str(error)
            outcomes.add("error")
    assert "error" in outcomes


def test_small_files_are_as_megatron_writes_them(tmp_path):
    """Megatron-LM looks for exactly these to know the format and the arguments."""
    folder = write(tmp_path / "written", BASE, whole_model(BASE))
    formats = json.loads((folder / "metadata.json").read_text())
    assert formats["sharded_backend"] == "torch_dist"
    common = safe.load_pt(folder / "common.pt")
    assert vars(common["args"]).items() >= BASE.items()


@pytest.mark.parametrize("trust", [False, True])
def test_arguments_inside_a_distcp_file(tmp_path, trust):
    """megatron-core 0.19 no longer writes common.pt: its arguments are an object among the tensors."""
    state = {safe.COMMON_KEY: [{"args": argparse.Namespace(num_layers=3), "iteration": 5}]}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(
        state | {"weight": torch.ones(2)}, checkpoint_id=tmp_path, planner=planner, no_dist=True
    )
    common = safe.load_common(tmp_path, trust=trust)
    assert (common["args"].num_layers, common["iteration"]) == (3, 5)
    torch.save({"iteration": 6}, tmp_path / "common.pt")  # 0.18 and before
    assert safe.load_common(tmp_path, trust=trust) == {"iteration": 6}


def test_no_arguments_anywhere(tmp_path):
    """Half a copy must say what it lacks."""
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(HelixError, match=r"has neither common\.pt nor common_state/shard_0_1\."):
        safe.load_common(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(HelixError, match=r"common\.pt"):
        safe.load_common(tmp_path)
