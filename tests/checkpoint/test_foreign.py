"""Files and paths that nobody vouches for end in one sentence: no traceback, no endless reading."""

from __future__ import annotations

import argparse
import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import CONFIGS, hashes, write_hugging_face

from helix_megatron.checkpoint import foreign
from helix_megatron.checkpoint.convert import Options, RankOptions, convert
from helix_megatron.checkpoint.foreign import (
    check_files,
    is_plain_name,
    read_bytes,
    read_json,
    resolved,
)
from helix_megatron.checkpoint.huggingface_io import HuggingFaceReader
from helix_megatron.checkpoint.manifest import Manifest, file_names, read_manifest, write_manifest
from helix_megatron.checkpoint.rank_io import rank_directory
from helix_megatron.checkpoint.safe import inspect
from helix_megatron.checkpoint.sources import layout_of, open_source, stock_flags
from helix_megatron.checkpoint.store import POINTER, Store
from helix_megatron.checkpoint.torch_files import load_pt
from helix_megatron.errors import HelixError


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"[" * 100_000, "no valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "no valid JSON"),
        (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", "nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"a": "\xff"}', "no valid JSON"),
        (b"[1]", "no JSON object"),
        (b"", "no valid JSON"),
    ],
)
def test_json_that_cannot_be_used(tmp_path, content, text):
    """Whatever the parser makes of it."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(HelixError, match=rf"config\.json is damaged: .*{text}"):
        read_json(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "itself", "nothing", "large"])
def test_what_is_no_file_is_not_read(tmp_path, monkeypatch, kind):
    """A pipe waits for a writer that never comes, and a device never ends."""
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "large":
        monkeypatch.setattr(foreign, "MOST_JSON", 10)
        path.write_text("{}" + " " * 9)
    elif kind != "nothing":
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(HelixError, match=r"config\.json (is no file|is missing|cannot be|has 11)"):
        read_json(path)
    if kind in ("pipe", "device"):
        with pytest.raises(HelixError, match="is no file"):
            load_pt(path)


PATHS = ["x" * 4000, "x/" * 2500, "a\0b", "itself/below"]


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_cannot_be(tmp_path, name):
    """As a source, a target or in --like."""
    (tmp_path / "itself").symlink_to("itself")
    source = write_hugging_face(tmp_path / "hf")
    path = f"{tmp_path}/{name}"
    said = r"cannot be a path|does not exist|leads to itself"
    for action in (
        lambda: open_source(path),
        lambda: convert(path, tmp_path / "target", "canonical"),
        lambda: convert(source, path, "canonical"),
    ):
        with pytest.raises(HelixError, match=said):
            action()


def test_targets_in_proc(tmp_path):
    """The kernel's own folders let nobody make a directory."""
    source = write_hugging_face(tmp_path / "hf")
    for target in ("/proc/model", "/proc/self/model"):
        with pytest.raises(HelixError, match=r"no directory can be made in|cannot write to"):
            convert(source, target, "canonical")


def test_plain_names():
    """What a file of a checkpoint may call a file beside it."""
    good = ["a", "global_step10", "a.safetensors", "…", "x" * 255]
    bad = ["", ".", "..", "a/b", "/a", "a\0b", "x" * 256, "\ud800", None, 1, ["a"]]
    assert [is_plain_name(name) for name in good + bad] == [True] * len(good) + [False] * len(bad)
    assert resolved("/proc/self/nothing").name == "nothing"


@pytest.mark.parametrize(
    "tag", ["..", ".", "", "a/../..", "nothing", "a\0b", "x" * 4000, "x" * 5000]
)
def test_a_tag_stays_in_the_directory(tmp_path, tag):
    """`latest` is a file of whoever made the checkpoint; a tag of --tag becomes a directory's name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest").write_text(tag)
    with pytest.raises(HelixError, match=r"latest (names|has 5,000 bytes)"):
        rank_directory(tmp_path / "run")
    if tag != "nothing":
        source = write_hugging_face(tmp_path / "hf")
        options = Options(ranks=RankOptions(tag=tag))
        with pytest.raises(HelixError, match="cannot name a directory"):
            convert(source, tmp_path / "target", "ranks", options)


def test_one_tensor_twice_in_a_header(tmp_path):
    """Readers take the first or the last of two."""
    source = write_hugging_face(tmp_path / "hf")
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode().rstrip()
    name = "model.norm.weight"
    entry = json.dumps({name: json.loads(header)[name]})[1:-1]
    header = (header[:-1] + "," + entry + "}").encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    with pytest.raises(HelixError, match=rf"safetensors is damaged: .*{name}.* is there twice"):
        HuggingFaceReader(source)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"model_type": ["llama"]}, r"model_type = \['llama'\]. It must be a text"),
        ({"model_type": None, "architectures": 1}, "architectures = 1. It must be a list of texts"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000"),
    ],
)
def test_values_of_a_config_that_no_program_writes(tmp_path, changed, text):
    """Through the converter, as a stranger would meet them."""
    source = write_hugging_face(tmp_path / "hf")
    (source / "config.json").write_text(json.dumps(CONFIGS["llama"] | changed))
    with pytest.raises(HelixError, match=text):
        convert(source, tmp_path / "target", "canonical")


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"segments": 10**9}, "segments is 1000000000. The most are 100,000"),
        (
            {"segments": 3, "model": {"num_attention_heads": 4}},
            "segments is 3, and num_attention_heads is 4",
        ),
        ({"iteration": 10**400}, "iteration is 1000"),
    ],
)
def test_numbers_of_a_manifest_have_a_range(changed, text):
    """A manifest's own hash proves nothing: whoever writes the one writes the other."""
    content = json.loads(Manifest("canonical", {}, attention="segment-local").to_json()) | changed
    with pytest.raises(HelixError, match=text):
        Manifest.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value"),
    [("tp", 10**9), ("pp", "2"), ("m", None), ("etp", 0), ("vocabulary_multiple", 1.5)],
)
def test_numbers_of_a_layout_have_a_range(key, value):
    """Ranks are counted before a file is looked for."""
    layout = dict.fromkeys(("tp", "pp", "ep", "etp", "m", "vocabulary_multiple"), 1)
    flags = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8}
    assert layout_of(Manifest("ranks", flags, layout=layout)).num_ranks == 1
    with pytest.raises(HelixError, match=f"layout has {key} = "):
        layout_of(Manifest("ranks", flags, layout=layout | {key: value}))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"window_size": []}, r"window_size is \[\]. It must be a whole number"),
        ({"rotary_percent": float("nan")}, "rotary_percent is nan. It must be a finite number"),
        ({"num_layers": 10**12}, "The largest valid value is 10,000"),
        ({"vocab_size": "9", "tokenizer_type": "NullTokenizer"}, "vocab_size is '9'"),
        (
            {"experimental_attention_variant": "gated_delta_net"},
            "experimental_attention_variant = 'gated_delta_net'",
        ),
        (
            {"multi_latent_attention": True, "qk_layernorm": False},
            "normalization is 'LayerNorm', and with",
        ),
        (
            {
                "multi_latent_attention": True,
                "rope_type": "rope",
                "rotary_scaling_factor": 4.0,
                "mscale_all_dim": 1.0,
            },
            "rope_type rope with rotary_scaling_factor 4.0 and mscale_all_dim 1.0",
        ),
        (
            {"hybrid_override_pattern": "M*"},
            r"hybrid_override_pattern = 'M\*'. Megatron-LM describes",
        ),
        (None, "has no arguments of Megatron-LM"),
    ],
)
def test_arguments_of_a_stock_checkpoint_have_a_range(tmp_path, arguments, text):
    """They are a pickle of values that anybody can write."""
    sizes = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "vocab_size": 8}
    kept = 1 if arguments is None else argparse.Namespace(**(sizes | arguments))
    torch.save({"args": kept}, tmp_path / "common.pt")
    with pytest.raises(HelixError, match=text):
        stock_flags(tmp_path)


def test_arguments_that_are_left_open_have_their_defaults(tmp_path):
    """Every checkpoint of Megatron-LM says mamba_num_heads = None, by which its Mamba layers find their own."""
    sizes = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "padded_vocab_size": 8}
    kept = argparse.Namespace(**sizes)
    torch.save({"args": kept}, tmp_path / "common.pt")
    wanted = stock_flags(tmp_path)
    kept.mamba_num_heads = kept.hybrid_layer_pattern = None
    torch.save({"args": kept}, tmp_path / "common.pt")
    assert stock_flags(tmp_path) == wanted


def test_a_manifest_that_is_a_pipe(tmp_path):
    """Its hash, too, is read only where it is a file."""
    write_manifest(tmp_path, Manifest("canonical", {}))
    checksum = tmp_path / "helix.json.sha256"
    checksum.unlink()
    os.mkfifo(checksum)
    with pytest.raises(HelixError, match=r"sha256 is no file"):
        read_manifest(tmp_path)


# ------------------------------------------------------------------------- the Hub's cache


def hub_cache(folder: Path, source: Path) -> Path:
    """A folder of the Hub's cache with the model of `source` in one of two snapshots."""
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "old").mkdir(parents=True)
    (folder / "snapshots" / "old" / "config.json").write_text("{}")
    source.rename(folder / "snapshots" / "abc")
    return folder


def test_a_folder_of_the_hubs_cache_is_a_model(tmp_path):
    """`models--x--y` itself is what people copy from an error message or a file manager."""
    source = write_hugging_face(tmp_path / "hf")
    expected = hashes(source)
    cache = hub_cache(tmp_path / "models--x--y", source)
    convert(cache, tmp_path / "store", "canonical")
    convert(tmp_path / "store", tmp_path / "back", "huggingface")
    assert hashes(tmp_path / "back") == expected
    for name in ("..", "gone", "a\0b", ""):
        (cache / "refs" / "main").write_text(name)
        with pytest.raises(HelixError, match=r"main names .*Valid: abc, old\."):
            open_source(cache)
    (cache / "refs" / "main").unlink()
    with pytest.raises(HelixError, match="main is missing"):
        open_source(cache)


def test_a_small_file_takes_little_memory(tmp_path):
    """Python sets aside what a read may give at most, and that is gigabytes for the largest models."""
    path = tmp_path / ".metadata"
    path.write_bytes(b"x" * 1000)
    tracemalloc.start()
    assert read_bytes(path, 1 << 30) == b"x" * 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def replace_by(path: Path, kind: str) -> None:
    """Put a pipe, a device, a link to itself or a directory in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)


KINDS = ("pipe", "device", "itself", "directory")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_another_library_opens(tmp_path, kind):
    """It would wait for ever, or read for ever."""
    check_files([tmp_path / "nothing"])
    replace_by(tmp_path / "x.json", kind)
    with pytest.raises(HelixError, match=r"x\.json (is no file|cannot be read)"):
        check_files([tmp_path / "x.json"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_pointer_that_cannot_be_read(tmp_path, kind):
    """A run that goes on says which checkpoint it takes; one that begins does not take it for a first start."""
    store = Store(tmp_path)
    replace_by(tmp_path / POINTER, kind)
    assert not store.is_unused()
    with pytest.raises(HelixError, match=rf"{POINTER} names '', and"):
        store.resolve()
    (tmp_path / "iter_0000003").mkdir()
    write_manifest(tmp_path / "iter_0000003", Manifest("canonical", {}))
    with pytest.warns(UserWarning, match="Iteration 3 is loaded instead"):
        assert store.resolve() == tmp_path / "iter_0000003"


def test_links_to_themselves_among_the_files(tmp_path):
    """They are named where the files are read, with no traceback where they are listed."""
    (tmp_path / "common.pt").symlink_to("common.pt")
    assert file_names(tmp_path) == ["common.pt"]
    with pytest.raises(HelixError, match=r"common\.pt cannot be read"):
        inspect(tmp_path)


def test_a_few_bytes_that_stand_for_a_large_tensor(tmp_path):
    """Whoever joins or copies them needs terabytes."""
    torch.save({"w": torch.ones(1).expand(10**12)}, tmp_path / "x.pt")
    with pytest.raises(HelixError, match=r"a tensor of shape \(1000000000000,\) repeats 4 bytes"):
        load_pt(tmp_path / "x.pt")
    torch.save({"w": torch.ones(1).expand(1000)}, tmp_path / "x.pt")
    assert load_pt(tmp_path / "x.pt")["w"].shape == (1000,)


def test_sentences_are_bounded(tmp_path):
    """A value of a damaged file may have any length."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x" * 10**6}))
    with pytest.raises(HelixError) as error:
        read_model_type(tmp_path / "config.json")
    assert len(str(error.value)) < 5000
    assert str(error.value).endswith("x' of a model.")


def read_model_type(path: Path) -> None:
    raise HelixError(f"{path} has the type {read_json(path)['model_type']!r} of a model.")
