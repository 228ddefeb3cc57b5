"""safetensors files: what is written the safetensors package reads, tensor by tensor, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
from tiny_checkpoints import hugging_face_tensors, write_hugging_face

from helix_megatron.checkpoint.huggingface_io import (
    DTYPES,
    INDEX,
    WEIGHTS,
    Entry,
    HuggingFaceReader,
    make_index,
    same_bits,
    shards,
    tensor_bytes,
    write_safetensors,
)
from helix_megatron.checkpoint.manifest import digest
from helix_megatron.errors import HelixError


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    entries = (Entry.of(name, tensor) for name, tensor in tensors.items())
    assert write_safetensors(path, entries, tensors.__getitem__) == digest(path)


ODD = {
    **{f"of {name}": torch.arange(3).to(dtype) for name, dtype in DTYPES.items()},
    'b.é\n"x"': torch.randn(3, 5),
    "a": torch.randn(3, 5).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 3).t(),
    "part": torch.randn(10, 10)[2:4, 3:5],
}


def test_files_are_read_by_the_safetensors_package(tmp_path):
    """Every dtype, odd names, empty and strided tensors: by the package, and by our reader through it."""
    path = tmp_path / "any_name.safetensors"
    write(path, ODD)
    reader = HuggingFaceReader(tmp_path)
    assert set(reader.names) == set(ODD)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without which transformers refuses a file
        for name, tensor in ODD.items():
            assert same_bits(file.get_tensor(name), tensor)
            assert same_bits(reader.read(name), tensor)
            assert reader.entry(name) == Entry.of(name, tensor)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    table = json.loads(path.read_bytes()[8 : 8 + header])
    for (
        name,
        tensor,
    ) in ODD.items():  # other readers map tensors, which only works where they are aligned
        assert (8 + header + table[name]["data_offsets"][0]) % tensor.dtype.itemsize == 0


def test_a_link_is_not_written_through(tmp_path):
    """What lies under a file's name may lead to a file of somebody else's."""
    (tmp_path / "precious").write_text("data")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    write(tmp_path / "out", {"a": torch.ones(2)})
    assert (tmp_path / "precious").read_text() == "data"
    assert not (tmp_path / "out").is_symlink()


def test_equal_bits():
    """torch.equal calls NaN different from itself and 0 equal to -0."""
    assert same_bits(torch.tensor([float("nan"), 0.0]), torch.tensor([float("nan"), 0.0]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert same_bits(torch.empty(0), torch.empty(0))
    assert bytes(tensor_bytes(torch.arange(4, dtype=torch.uint8).reshape(2, 2).t())) == b"\0\2\1\3"


def test_shards():
    """Names and contents as Hugging Face has them: no file over the limit, a large tensor alone."""
    entries = [
        Entry(name, torch.float32, (size,)) for name, size in zip("abcd", (2, 2, 9, 1), strict=True)
    ]
    assert list(shards(entries, 100)) == [WEIGHTS]
    files = shards(entries, 16)
    assert list(files) == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert [[item.name for item in part] for part in files.values()] == [["a", "b"], ["c"], ["d"]]
    index = json.loads(make_index(files))
    assert index["metadata"]["total_size"] == 56
    assert index["weight_map"]["c"] == "model-00002-of-00003.safetensors"


@pytest.mark.parametrize("files", [1, 3])
def test_models_are_read(tmp_path, files):
    """One file, and shards with an index."""
    reader = HuggingFaceReader(write_hugging_face(tmp_path / "model", files=files))
    tensors = hugging_face_tensors("llama")
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.read(name).equal(tensor)


def test_transformers_reads_an_index_of_ours(tmp_path):
    """The names in the index file are the format's: checked against the package that reads them."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = hugging_face_tensors("llama")
    limit = 20_000
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    ours = shards([Entry.of(name, tensor) for name, tensor in tensors.items()], limit)
    index = json.loads(make_index(ours))
    assert set(theirs.filename_to_tensors) == set(ours)
    assert theirs.metadata["total_size"] == index["metadata"]["total_size"]
    assert theirs.tensor_to_filename.keys() == index["weight_map"].keys()


def damage(folder: Path, kind: str) -> str:
    """Damage a model of three files; the file that the error must name."""
    shard = folder / "model-00002-of-00003.safetensors"
    index = json.loads((folder / INDEX).read_text())
    content = shard.read_bytes()
    if kind == "missing shard":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(content[:-3])
    elif kind == "longer":
        shard.write_bytes(content + b"abc")
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "header length":
        shard.write_bytes(b"\xff" * 8 + content[8:])
    elif kind == "header":
        shard.write_bytes(content[:8] + b"x" + content[9:])
    elif kind == "index":
        (folder / INDEX).write_text("{")
        return INDEX
    elif kind == "index without a table":
        (folder / INDEX).write_text('{"weight_map": [1]}')
        return INDEX
    elif kind == "path that leaves":
        name = next(iter(index["weight_map"]))
        index["weight_map"][name] = "../model.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
        return INDEX
    elif kind == "tensor in another shard":
        name = next(name for name, file in index["weight_map"].items() if file == shard.name)
        index["weight_map"][name] = "model-00001-of-00003.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
        return name
    elif kind == "tensor twice":
        (folder / "model-00001-of-00003.safetensors").write_bytes(content)
    return shard.name


DAMAGE = [
    "missing shard",
    "truncated",
    "longer",
    "empty",
    "header length",
    "header",
    "index",
    "index without a table",
    "path that leaves",
    "tensor in another shard",
    "tensor twice",
]


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(tmp_path, kind):
    """Before the first tensor is read."""
    folder = write_hugging_face(tmp_path / "model", files=3)
    name = damage(folder, kind)
    with pytest.raises(HelixError) as error:
        HuggingFaceReader(folder)
    assert name in str(error.value)


def test_pickled_weights_are_refused(tmp_path):
    """They are programs; the text says what makes safetensors of them."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(HelixError, match=r"pytorch_model.bin.*can execute code.*save_pretrained"):
        HuggingFaceReader(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(
        HelixError, match=r"2 safetensors files and no model.safetensors.index.json"
    ):
        HuggingFaceReader(tmp_path)
    with pytest.raises(HelixError, match=r"neither model.safetensors nor"):
        HuggingFaceReader(tmp_path / "nowhere")


def test_unknown_dtypes_are_refused(tmp_path):
    """A new format of numbers must not be taken for another."""
    header = b'{"a":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}   '
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(
        HelixError, match=r"tensor a of .*model.safetensors has dtype F4. Known: F64"
    ):
        HuggingFaceReader(tmp_path)
