"""Nothing in a checkpoint executes: each hostile file does through pickle, and does not through `safe`."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from malicious import (
    PAYLOADS,
    Call,
    Raw,
    directory_files,
    metadata_pickle,
    plain_pickle,
    torch_file,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from helix_megatron.arguments import as_flag
from helix_megatron.checkpoint import safe
from helix_megatron.errors import HelixError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What every payload tries to create."""
    return tmp_path / "marker"


def object_checkpoint(directory: Path, value: object, key: str = "rng_state") -> Path:
    """A distributed checkpoint of torch with a tensor and an object."""
    dcp.save({"weight": torch.arange(6.0), key: value}, checkpoint_id=directory)
    return directory


@pytest.mark.parametrize("name", PAYLOADS)
def test_payloads_execute_through_pickle(name, marker):
    """What makes the tests below worth something."""
    pickle.loads(plain_pickle(PAYLOADS[name](str(marker))))
    assert marker.exists()
    marker.unlink()
    torch.load(io.BytesIO(torch_file(PAYLOADS[name](str(marker)))), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_metadata(name, marker, tmp_path):
    """`.metadata` is a plain pickle that every stock reader trusts."""
    path = tmp_path / ".metadata"
    payload = PAYLOADS[name](str(marker))
    for content in (plain_pickle(payload), metadata_pickle(payload)):
        path.write_bytes(content)
        for read in (
            safe.load_metadata,
            lambda path: safe.inspect(path.parent),
        ):
            with pytest.raises(HelixError) as error:
                read(path)
            assert str(path) in str(error.value)
            assert not marker.exists()
    assert " is refused: it asks for " in str(error.value)
    assert "--trust-checkpoint: it may then run any program" in error.value.worded(as_flag)
    safe.load_metadata(path, trust=True)
    assert marker.exists()


@pytest.mark.parametrize("name", PAYLOADS)
def test_torch_files(name, marker, tmp_path, monkeypatch):
    """common.pt and files of ranks, whatever the environment or another package allows."""
    payload = PAYLOADS[name](str(marker))
    path = tmp_path / "checkpoint" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(torch_file(payload))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with torch.serialization.safe_globals([Call, eval, exec, getattr, open]):
        allowed_before = torch.serialization.get_safe_globals()
        for read in (
            lambda: safe.load_pt(path),
            lambda: safe.load_pt(path, mmap=True),
            lambda: safe.load_pt(path.read_bytes(), name=str(path)),
            lambda: safe.inspect(tmp_path / "checkpoint"),
        ):
            with pytest.raises(HelixError) as error:
                read()
            assert f"{path} is refused: " in str(error.value)
            assert "trust_checkpoint" in str(error.value)
            assert not marker.exists()
        assert set(torch.serialization.get_safe_globals()) == set(allowed_before)
    safe.load_pt(path, trust=True)
    assert marker.exists()


@pytest.mark.parametrize("name", [name for name in PAYLOADS if "name" not in name])
def test_objects_in_distcp_files(name, marker, tmp_path):
    """torch's and megatron-core's planners read them with weights_only=False."""
    directory = object_checkpoint(tmp_path / "dcp", PAYLOADS[name](str(marker)))
    assert not marker.exists()
    before = directory_files(directory)
    with pytest.raises(HelixError) as error:
        safe.inspect(directory)
    assert f"{directory}/__0_0.distcp (rng_state) is refused" in str(error.value)
    assert not marker.exists()
    assert directory_files(directory) == before
    safe.inspect(directory, trust=True)
    assert not marker.exists()
    dcp.load({"rng_state": None}, checkpoint_id=directory)
    assert marker.exists()


@pytest.mark.parametrize("form", ["legacy", "pickle", "tar", "script", "text"])
def test_other_formats_of_torch(form, marker, tmp_path):
    """torch.load reads more than zip files; none of the others is needed."""
    path = tmp_path / "common.pt"
    payload = PAYLOADS["os.system"](str(marker))
    if form == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    elif form == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    elif form == "tar":
        (tmp_path / "pickle").write_bytes(plain_pickle(payload))
        shutil.make_archive(str(tmp_path / "x"), "tar", tmp_path, "pickle")
        (tmp_path / "x.tar").rename(path)
    else:
        path.write_bytes(plain_pickle(payload) if form == "pickle" else b"nothing")
    with pytest.raises(HelixError) as error:
        safe.load_pt(path)
    assert str(path) in str(error.value)
    assert ("zip format" if form != "script" else "torchscript") in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "holder", ["bytes tensor", "int8 tensor", "BytesIO", "BytesIO of torch", "in a list"]
)
def test_extra_state(holder, marker, tmp_path):
    """Transformer Engine unpickles its `_extra_state` itself: the pickle is inside an innocent tensor."""

    def wrapped(content: bytes) -> object:
        if holder.startswith("BytesIO"):
            return io.BytesIO(content)
        dtype = torch.int8 if "int8" in holder else torch.uint8
        tensor = torch.frombuffer(bytearray(content), dtype=dtype)
        return [tensor] if "list" in holder else tensor

    payload = PAYLOADS["eval"](str(marker))
    hostile = torch_file(payload) if "torch" in holder else pickle.dumps(payload)
    key = "decoder.layers.self_attention._extra_state/shard_0_1"
    file = tmp_path / "model" / "_extra_state" / "shard_0_1.pt"
    file.parent.mkdir(parents=True)
    torch.save(wrapped(hostile), file)
    with pytest.raises(HelixError, match=r"_extra_state/shard_0_1\.pt is refused"):
        safe.inspect(tmp_path / "model")
    torch.save({key: wrapped(hostile)}, file.with_name("state.pt"))
    file.unlink()
    with pytest.raises(HelixError, match=r"state\.pt is refused"):
        safe.inspect(tmp_path / "model")
    file.with_name("state.pt").unlink()
    assert not marker.exists()
    # Plain values pass, and nothing at all, which is what a model in bf16 has.
    values = torch_file({"x": 1}) if "torch" in holder else pickle.dumps({"x": 1})
    if holder != "BytesIO":
        torch.save({key: wrapped(values)}, file)
    if "BytesIO" in holder:
        torch.save({key: io.BytesIO()}, file.with_name("empty.pt"))
    safe.inspect(tmp_path / "model")


def test_classes_stay_as_they_were(tmp_path):
    """A pickle can set attributes of the classes that it names, which would act on every later reader."""
    path = tmp_path / ".metadata"
    before = dict(vars(Metadata)), dict(vars(_MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST))
    name = "torch.distributed.checkpoint.metadata"
    set_on_class = f"c{name}\nMetadata\n(N}}(U\x08pollutedK\x01U\x07versionK\x02utb.".encode(
        "latin1"
    )
    on_member = f"c{name}\n_MEM_FORMAT_ENCODING\nK\x01\x85R}}U\x07_value_K\x02sb.".encode("latin1")
    for content in (set_on_class, on_member):
        path.write_bytes(content)
        with pytest.raises(HelixError, match="it asks for a change of"):
            safe.load_metadata(path)
        assert dict(vars(Metadata)) == before[0]
        assert dict(vars(_MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST)) == before[1]
    try:
        pickle.loads(set_on_class)
        assert Metadata.polluted == 1
    finally:
        del Metadata.polluted
        del Metadata.version
        if "version" in before[0]:  # torch 2.6 has none
            Metadata.version = before[0]["version"]


def forged(**changes):
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": 4} | changes
    return Metadata({}, storage_data={MetadataIndex("weight"): _StorageInfo(**place)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (forged(relative_path="../../other/__0_0.distcp"), "outside the checkpoint"),
        (forged(relative_path="/etc/passwd"), "weight lies in '/etc/passwd', outside"),
        (forged(relative_path=None), "outside the checkpoint"),
        (forged(offset=-4), "weight has the offset and length"),
        (forged(length="4"), "weight has the offset and length"),
        (Metadata({"weight": 3}, storage_data={}), "'weight' is neither a tensor with a shape nor"),
        (Metadata({}, storage_data=None), "its tables are missing"),
        (Metadata({}, storage_data={"x": 1}), "'x' has no place in a file"),
        ({"a": 1}, "it holds dict, not the metadata"),
        (None, "it holds NoneType"),
    ],
)
def test_forged_metadata(content, message, tmp_path):
    """Made of allowed classes only, and still not to be followed: to files elsewhere, for one."""
    path = tmp_path / ".metadata"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(HelixError) as error:
        safe.load_metadata(path)
    assert f"{path} is damaged or forged" in str(error.value)
    assert message in str(error.value)


class Forged:
    """A NumPy dtype of objects that claims to be one of numbers: its array's bytes become pointers."""

    def __init__(self, code: str, *state: object) -> None:
        self.code, self.state = code, state

    def __reduce__(self):
        return np.dtype, (self.code, False, True), self.state


@pytest.mark.parametrize(
    "value",
    [
        Forged("O8", 3, "|", None, None, None, -1, -1, 0),
        Forged("f8", 3, "<", None, None, None, -1, -1, 63),
        Forged("f8", 3, "<", None, None, None, 64, 8, 0),
        Forged("f8", 3, "<", None, ("a",), {"a": (np.dtype("O"), 0)}, -1, -1, 0),
        np.dtype([("a", "f8")]),
        np.dtype("O"),
        Call(np.core.multiarray._reconstruct, dict, (0,), b"b"),
        Call(np.core.multiarray.scalar, np.dtype("f8"), [1]),
    ],
)
def test_numpy_is_not_trusted(value, tmp_path):
    """NumPy's unpickling is not memory-safe: found by reading it, and refused before it is called."""
    with pytest.raises(HelixError, match=r"x\.pt (is refused|cannot be read)"):
        safe.load_pt(torch_file(value), name="x.pt")


def test_ordinary_values(tmp_path):
    """What Megatron's own files hold, exactly as it was: random states continue a run bit for bit."""
    state = np.random.RandomState(5).get_state()
    tensor = torch.arange(4, dtype=torch.bfloat16)
    shared = np.arange(3)
    value = {
        "args": argparse.Namespace(dtype=torch.bfloat16, sizes=[1, 2], shape=torch.Size([2])),
        "simple": types.SimpleNamespace(array=shared),
        "rng": [{"np_rng_state": state, "random_rng_state": random.Random(3).getstate()}],
        "arrays": (
            shared,
            shared,
            np.zeros(0),
            np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            np.arange(3, dtype=">i4"),
            np.array(["ä", "bc"]),
            np.array([True]),
        ),
        "numbers": (np.float64(1.5), np.int32(-3), np.bool_(True)),
        "path": Path("/a/b"),
        "bytes": (b"", b"\xff\x00", bytearray(b"x"), io.BytesIO(b"abc")),
        "weight": tensor,
    }
    torch.save(value, tmp_path / "common.pt")
    for mmap in (False, True):
        read = safe.load_pt(tmp_path / "common.pt", mmap=mmap)
        assert read["args"] == value["args"]
        assert (read["simple"].array == shared).all()
        (rng,) = read["rng"]
        assert rng["random_rng_state"] == random.Random(3).getstate()
        again = np.random.RandomState(0)
        again.set_state(rng["np_rng_state"])
        assert (again.random(9) == np.random.RandomState(5).random(9)).all()
        for a, b in zip(read["arrays"], value["arrays"], strict=True):
            assert type(a) is np.ndarray
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert (a == b).all()
        assert read["numbers"] == value["numbers"]
        assert [type(number) for number in read["numbers"]] == [np.float64, np.int32, np.bool_]
        assert str(read["path"]) == "/a/b"
        assert read["bytes"][:3] == value["bytes"][:3]
        assert read["bytes"][3].getvalue() == b"abc"
        assert torch.equal(read["weight"], tensor)


def test_metadata_of_torch(tmp_path):
    """The same object as pickle gives."""
    directory = object_checkpoint(
        tmp_path / "dcp", {"np": np.random.get_state(), "path": Path("x")}
    )
    safe.inspect(directory)
    assert safe.load_metadata(directory / ".metadata") == pickle.loads(
        (directory / ".metadata").read_bytes()
    )


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_damage(file, tmp_path):
    """Truncated or flipped: a HelixError that names the file, or the value where a byte does not matter."""
    directory = object_checkpoint(tmp_path / "dcp", [1, 2, "three"])
    torch.save({"args": argparse.Namespace(a=1)}, directory / "common.pt")
    safe.inspect(directory)
    path = directory / file
    good = path.read_bytes()
    (entry,) = [
        place
        for index, place in safe.load_metadata(directory / ".metadata").storage_data.items()
        if "rng_state" in index.fqn
    ][:1]
    end = entry.offset + entry.length if file == "__0_0.distcp" else len(good)
    for length in [0, 1, *range(2, end, end // 12), end - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(HelixError) as error:
            safe.inspect(directory)
        assert str(path) in str(error.value)
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        content = bytearray(good)
        content[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        path.write_bytes(content)
        try:
            safe.inspect(directory)
        except HelixError as error:
            refused += 1
            assert str(directory) in str(error)
    assert refused > 5
    path.unlink()
    if file == "common.pt":  # whether it is needed is its reader's business
        return
    with pytest.raises(HelixError, match=rf"{file}.* (is missing|cannot be read: No such file)"):
        safe.inspect(directory)


def test_formats_with_pickles_elsewhere(tmp_path):
    """megatron-core's zarr format is not looked into, hence not read."""
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(HelixError, match=r"format is 'zarr'\. Only torch_dist can be read"):
        safe.inspect(tmp_path)
    for content in ("{}", "[]", "", "\xff"):
        (tmp_path / "metadata.json").write_text(content, encoding="latin1")
        with pytest.raises(HelixError, match=r"metadata\.json is damaged"):
            safe.inspect(tmp_path)


def test_unknown_classes_of_megatron():
    """Enumerations come by name from where they are installed; a name that is not there is an error."""
    raw = Raw(b"\x80\x02cmegatron.core.enums\nNoSuchThing\nK\x01\x85R.")
    with pytest.raises(HelixError, match=r"megatron\.core\.enums\.NoSuchThing, which is not inst"):
        safe.load_pt(torch_file(raw), name="common.pt")
    raw = Raw(b"\x80\x02cmegatron.core.enums\nenum\nK\x01\x85R.")  # a module there
    with pytest.raises(HelixError, match=r"is refused: it holds megatron\.core\.enums\.enum"):
        safe.load_pt(torch_file(raw), name="common.pt")


# ------------------------------------------------------------- megatron-core's own


def save_with_megatron(directory: str, marker: str) -> None:
    """What training writes, and beside it the same with a hostile object."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.enums import ModelType
    from megatron.core.rerun_state_machine import RerunMode
    from megatron.core.transformer.enums import AttnBackend

    from helix_megatron.megatron import cpu_runtime

    cpu_runtime.install()
    rng = [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}]
    hostile = PAYLOADS["os.system"](marker)
    for name, value in (("good", rng), ("hostile", hostile)):
        state = {
            "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(8.0).view(2, 4)),
            "rng": ShardedObject("rng_state", value, (1,), (0,)),
            "extra": ShardedObject("decoder._extra_state", None, (1,), (0,)),
            "extra2": ShardedObject("output._extra_state", io.BytesIO(b""), (1,), (0,)),
            "args": argparse.Namespace(
                params_dtype=torch.bfloat16,
                attention_backend=AttnBackend.auto,
                model_type=ModelType.encoder_or_decoder,
            ),
            "rerun": {"mode": RerunMode.DISABLED, "number": np.float64(3.0)},
            "iteration": 3,
        }
        os.makedirs(f"{directory}/{name}")
        dist_checkpointing.save(state, f"{directory}/{name}")


def test_checkpoints_of_megatron(pool, tmp_path, marker):
    """All that megatron-core itself writes is read, and a hostile object among it is not."""
    pool.run(save_with_megatron, str(tmp_path), str(marker), world_size=1)
    good, hostile = tmp_path / "good", tmp_path / "hostile"
    safe.inspect(good)
    trusted = pickle.loads((good / ".metadata").read_bytes())
    metadata = safe.load_metadata(good / ".metadata")
    assert metadata == trusted
    assert vars(metadata).keys() == vars(trusted).keys()  # megatron-core adds fields of its own
    common = safe.load_common(good)
    assert common["iteration"] == 3
    assert common["rerun"]["number"] == 3.0
    assert str(common["args"].attention_backend) == "AttnBackend.auto"
    with pytest.raises(
        HelixError, match=r"distcp \(rng_state/shard_0_1\) is refused: it holds posix"
    ):
        safe.inspect(hostile)
    assert not marker.exists()
