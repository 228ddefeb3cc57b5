"""The converter as a whole: there and back to the same bytes, by its command line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import CONFIGS, OWN, TOKENIZER, hashes, write_hugging_face
from waiting import PROGRAM_LIMIT, printed_afresh

from helix_megatron import cli
from helix_megatron.checkpoint import huggingface_io
from helix_megatron.checkpoint.catalog import segment_local_permutation
from helix_megatron.checkpoint.command import main, parse_size
from helix_megatron.checkpoint.convert import (
    Options,
    RankOptions,
    _complete,
    convert,
    make_target,
)
from helix_megatron.checkpoint.manifest import read_manifest
from helix_megatron.checkpoint.source import Derived, Source
from helix_megatron.checkpoint.sources import open_source
from helix_megatron.checkpoint.store import Store
from helix_megatron.config import HelixConfig
from helix_megatron.errors import HelixError
from helix_megatron.model.description import ModelConfig

ROOT = Path(__file__).parents[2]
CUT = "--tensor-model-parallel-size 2 --intra-head-parallel-size 2"


def helix(command: str, *paths: Path) -> int:
    """Exit status of `helix convert PATHS COMMAND`."""
    with contextlib.suppress(SystemExit):
        return cli.main(["convert", *map(str, paths), *command.split()])
    return 2


# ------------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    ("model", "files", "dtype"),
    [
        ("llama", 1, torch.float32),
        ("llama", 3, torch.bfloat16),
        ("mixtral", 2, torch.float16),
        ("gpt2", 2, torch.float32),
    ],
)
def test_there_and_back_gives_the_same_files(tmp_path, model, files, dtype):
    """Hugging Face → canonical → one file per rank → Hugging Face: all tensors, and tokenizers."""
    source = write_hugging_face(tmp_path / "hf", model, files=files, dtype=dtype)
    assert helix("--to canonical --verify", source, tmp_path / "store") == 0
    assert helix("--to huggingface --verify", tmp_path / "store", tmp_path / "back") == 0
    assert hashes(tmp_path / "back") == hashes(source)
    assert helix(f"--to ranks --verify {CUT}", tmp_path / "store", tmp_path / "ranks") == 0
    assert helix("--to huggingface", tmp_path / "ranks", tmp_path / "from ranks") == 0
    assert hashes(tmp_path / "from ranks") == hashes(source)
    assert helix("--to canonical", tmp_path / "ranks", tmp_path / "again") == 0
    assert open_source(tmp_path / "again").flags == open_source(tmp_path / "store").flags
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"hf", "store", "back", "ranks", "from ranks", "again"}, "nothing is left over"


def test_transformers_loads_a_converted_model(tmp_path):
    """With another dtype and small files the original files cannot be made again: new ones must be as good."""
    from transformers import AutoModelForCausalLM

    source = write_hugging_face(tmp_path / "hf")
    command = "--to huggingface --dtype bf16 --shard-size 10kB"
    assert helix(command, source, tmp_path / "small") == 0
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert ours.state_dict()[name].equal(value), name


def test_a_canonical_target_is_a_store_that_megatron_loads(tmp_path):
    """`release` is Megatron's name for weights that no iteration trained: no optimizer state is expected."""
    source = write_hugging_face(tmp_path / "hf")
    assert helix("--to canonical --shard-size 20kB", source, tmp_path / "store") == 0
    assert (tmp_path / "store" / "latest_checkpointed_iteration.txt").read_text() == "release"
    release = tmp_path / "store" / "release"
    assert Store(tmp_path / "store").resolve() == release
    assert len(list(release.glob("*.distcp"))) > 2
    manifest = read_manifest(release)
    assert (manifest.kind, manifest.iteration, manifest.attention) == ("canonical", None, "exact")
    assert manifest.model["num_query_groups"] == 2
    for path in (tmp_path / "store", release):
        assert open_source(path).kind == "canonical"
    assert {path.name for path in (release / "huggingface").iterdir()} >= TOKENIZER.keys()


def test_stock_checkpoints_tell_their_model(tmp_path):
    """A checkpoint of Megatron-LM has no manifest: sizes come from the arguments that it keeps."""
    source = write_hugging_face(tmp_path / "hf")
    assert helix("--to canonical", source, tmp_path / "store") == 0
    release = tmp_path / "store" / "release"
    for name in OWN:
        (release / name).unlink()
    common = torch.load(release / "common.pt", weights_only=False)
    arguments = vars(common["args"])
    arguments["add_bias_linear"] = not arguments.pop("disable_bias_linear")
    torch.save(common, release / "common.pt")
    assert helix("--to huggingface --verify", tmp_path / "store", tmp_path / "back") == 0
    assert hashes(tmp_path / "back") == hashes(source)


def test_a_model_that_never_was_in_hugging_face_goes_there(tmp_path):
    """Trained here: the family follows from the flags, and config.json and names are made."""
    source = write_hugging_face(tmp_path / "hf")
    assert helix("--to canonical", source, tmp_path / "store") == 0
    plain = tmp_path / "store" / "release"
    for path in (plain / "huggingface").iterdir():
        path.unlink()
    command = "--to huggingface --no-verify-source"
    assert helix(command, plain, tmp_path / "back") == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "float32")
    tensors = huggingface_io.HuggingFaceReader(tmp_path / "back")
    original = huggingface_io.HuggingFaceReader(source)
    assert set(tensors.names) == set(original.names)
    assert all(tensors.read(name).equal(original.read(name)) for name in original.names)


@pytest.mark.parametrize("kind", ["canonical", "huggingface", "ranks"])
def test_mixed_dtypes_become_the_one_that_is_asked_for(tmp_path, kind):
    """Merged models have shards of several dtypes. Without --dtype nobody knows which is meant."""
    source = write_hugging_face(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    mixed = tensors | {name: tensors[name].bfloat16()}
    save_file(mixed, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(HelixError, match=rf"{name} is torch.bfloat16 and .*q_proj.* dtype="):
        convert(source, tmp_path / kind, kind)
    convert(source, tmp_path / kind, kind, Options(dtype="bf16", verify=True))
    convert(tmp_path / kind, tmp_path / "back", "huggingface")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[key].equal(value.bfloat16()) for key, value in tensors.items())


def test_rows_that_pad_the_vocabulary_never_leave(tmp_path):
    """Training at TP 2 pads 61 tokens to 62 rows, or 128: transformers must get 61."""
    source = write_hugging_face(tmp_path / "hf")
    assert helix("--to canonical", source, tmp_path / "store") == 0
    padded = _Padded(open_source(tmp_path / "store"), 62)
    target = make_target(padded, "canonical", Options())
    run = tmp_path / "run"
    run.mkdir()
    records = {unit: target.write(unit, run, lambda _: None) for unit in target.units}
    _complete(target, run, records)
    assert read_manifest(run / "release").model["padded_vocab_size"] == 62
    assert helix("--to huggingface --verify", run, tmp_path / "back") == 0
    assert hashes(tmp_path / "back") == hashes(source)
    for path in (run / "release" / "huggingface").iterdir():
        path.unlink()  # as of a model that was trained here from the start
    assert helix("--to huggingface --no-verify-source", run / "release", tmp_path / "made") == 0
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["vocab_size"] == 61
    rows = huggingface_io.HuggingFaceReader(tmp_path / "made").entry("lm_head.weight").shape
    assert rows == (61, 32)
    assert read_manifest(tmp_path / "made").model["padded_vocab_size"] == 61


class _Padded(Derived):
    """A source as a training run leaves it: with rows that no token has."""

    def __init__(self, source: Source, rows: int) -> None:
        super().__init__(source, source.flags | {"padded_vocab_size": rows})

    def read(self, name: str) -> torch.Tensor:
        value = self._source.read(name)
        if value.shape[0] != 61:
            return value
        return torch.cat([value, torch.ones(self.shape(name)[0] - 61, value.shape[1])])


def test_rank_files_of_a_run_need_something_like_them(tmp_path):
    """DeepSpeed writes no manifest: model and layout come from converted files of the same layout."""
    source = write_hugging_face(tmp_path / "hf")
    command = f"--to ranks {CUT} --pipeline-model-parallel-size 2 --make-vocab-size-divisible-by 8"
    assert helix(command, source, tmp_path / "ranks") == 0
    run = tmp_path / "run"
    (run / "global_step10").mkdir(parents=True)
    for path in (tmp_path / "ranks" / "global_step0").iterdir():
        os.link(path, run / "global_step10" / path.name)
    (run / "latest").write_text("global_step10")
    with pytest.raises(HelixError, match=r"no manifest .*Give like, a directory"):
        convert(run, tmp_path / "back", "huggingface")
    like = f"--to huggingface --like {tmp_path / 'ranks'}"
    assert helix(like, run, tmp_path / "back") == 0
    weights = "model.safetensors"
    assert hashes(tmp_path / "back")[weights] == hashes(source)[weights]


def test_side_files_come_from_the_model_alone(tmp_path):
    """A link out of the model's folder could carry any file of this machine into the result."""
    source = write_hugging_face(tmp_path / "hf")
    (tmp_path / "secret.txt").write_text("key")
    (source / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (source / "modeling.py").write_text("import os")
    (source / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.warns(
        UserWarning, match=r"secret\.txt is a link to another folder, and is left out"
    ):
        assert helix("--to canonical", source, tmp_path / "store") == 0
    carried = {path.name for path in (tmp_path / "store" / "release" / "huggingface").iterdir()}
    assert carried == {"config.json", "model.safetensors.index.json", *TOKENIZER}
    # A snapshot of the Hub's cache is made of links.
    (source / "secret.txt").unlink()
    blobs, snapshot = (tmp_path / "hub" / name for name in ("blobs", "snapshots/abc"))
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for path in source.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert helix("--to canonical", snapshot, tmp_path / "from hub") == 0
    same = {path.name for path in (tmp_path / "from hub" / "release" / "huggingface").iterdir()}
    assert same == carried


# -------------------------------------------------------------------- segment-local


def test_segment_local_needs_consent_and_says_what_it_costs(tmp_path, capsys):
    """The one conversion that changes what the model computes."""
    source = write_hugging_face(tmp_path / "hf")
    command = "--to canonical --attention segment-local --segments 2"
    assert helix(command, source, tmp_path / "local") == 2
    assert "6.31 → 7.24" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "local").exists()
    assert helix(f"{command} --allow-quality-loss --verify", source, tmp_path / "local") == 0
    assert "Warning: segment-local attention is another architecture" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "local" / "release")
    assert (manifest.attention, manifest.segments) == ("segment-local", 2)
    sizes = [manifest.model[k] for k in ("num_attention_heads", "num_query_groups", "kv_channels")]
    assert sizes == [8, 4, 4]
    before, after = open_source(source), open_source(tmp_path / "local")
    rows, columns = segment_local_permutation(ModelConfig.from_flags(before.flags), 2)
    name = "decoder.layers.1.self_attention.linear_{}.weight"
    qkv, proj = (before.read(name.format(kind)) for kind in ("qkv", "proj"))
    assert after.read(name.format("qkv")).equal(qkv[torch.from_numpy(rows)])
    assert after.read(name.format("proj")).equal(proj[:, torch.from_numpy(columns)])
    # It stays what it is in any other form, and cannot be converted twice.
    assert helix("--to huggingface", tmp_path / "local", tmp_path / "hf local") == 0
    assert read_manifest(tmp_path / "hf local").attention == "segment-local"
    assert helix("--to canonical --verify", tmp_path / "hf local", tmp_path / "again") == 0
    assert hashes(tmp_path / "again" / "release")["__0_0.distcp"]
    ranks = RankOptions(tensor=8, helix=HelixConfig(2))
    convert(tmp_path / "again", tmp_path / "ranks", "ranks", Options(ranks=ranks, verify=True))
    assert read_manifest(tmp_path / "ranks").segments == 2
    assert helix(f"{command} --allow-quality-loss", tmp_path / "local", tmp_path / "twice") == 2
    assert "segment-local already" in capsys.readouterr().err
    with pytest.raises(HelixError, match="of 2 segments, which cannot become 4"):
        ranks = RankOptions(tensor=8, helix=HelixConfig(4))
        convert(tmp_path / "local", tmp_path / "other", "ranks", Options(ranks=ranks))


def test_a_dry_run_prints_everything_and_writes_nothing(tmp_path, capsys):
    """The table is of what would really be written: compared with what is then written."""
    source = write_hugging_face(tmp_path / "hf")
    commands = {"canonical": "--to canonical", "ranks": f"--to ranks {CUT}"}
    commands["huggingface"] = "--to huggingface --shard-size 20kB"
    for kind, command in commands.items():
        assert helix(f"{command} --dry-run", source, tmp_path / kind) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {path.name for path in tmp_path.iterdir()} <= {"hf", *commands}
        assert not (tmp_path / kind).exists()
        assert lines[0].split() == ["tensor", "shape", "dtype", "from", "file"]
        assert "the largest tensor has" in lines[-1]
        assert helix(command, source, tmp_path / kind) == 0
        files = {line.split()[-1] for line in lines[1:-1]}
        weights = ("*.distcp", "mp_rank*.pt", "*.safetensors")
        written = {
            path.relative_to(tmp_path / kind).as_posix()
            for pattern in weights
            for path in (tmp_path / kind).rglob(pattern)
        }
        assert files == written
        capsys.readouterr()
    text = "\n".join(lines)
    assert "model.layers.1.self_attn.q_proj.weight" in text


# ----------------------------------------------------------------------- command line

TEXTS = [
    ("--to ranks --tensor-model-parallel-size 3", "4 heads cannot be dealt whole to 3"),
    ("--to ranks --intra-head-parallel-size 3", "does not divide the tensor parallel size 1"),
    ("--to canonical --intra-head-parallel-size 2", "has no effect with --to canonical"),
    ("--to ranks --shard-size 5GB", "--shard-size has no effect with --to ranks"),
    ("--to canonical --shard-size 5XB", "'5XB' is no size"),
    ("--to canonical --shard-size 0", "'0' is no size. Give bytes, at least one"),
    ("--to canonical --attention segment-local", "belong together"),
    ("--to canonical --segments 2", "belong together"),
    ("--to ranks --tag a/b", "the tag 'a/b' cannot name a directory"),
    (
        "--to canonical --attention segment-local --segments 3 --allow-quality-loss",
        "Valid numbers of segments: 1, 2, 4",
    ),
]


@pytest.mark.parametrize(("command", "text"), TEXTS)
def test_wrong_settings_exit_with_2_and_one_paragraph(tmp_path, capsys, command, text):
    """Before anything is written, and without a traceback."""
    source = write_hugging_face(tmp_path / "hf")
    with pytest.raises(SystemExit) as left:
        main([str(source), str(tmp_path / "target"), *command.split()])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("helix convert: error: ")
    assert text in " ".join(error.split())
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_wrong_paths(tmp_path):
    """No checkpoint, a file, one directory in the other."""
    source = write_hugging_face(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    wrong = {
        tmp_path / "nowhere": "nowhere does not exist",
        source / "config.json": "is a file",
        tmp_path / "empty": "is no checkpoint that can be read",
    }
    for path, text in wrong.items():
        with pytest.raises(HelixError, match=text):
            convert(path, tmp_path / "target", "canonical")
    for target in (source, source / "below", tmp_path):
        with pytest.raises(HelixError, match="lie in each other"):
            convert(source, target, "canonical", Options(overwrite=True))
    with pytest.raises(HelixError, match="Valid: canonical, huggingface, ranks"):
        convert(source, tmp_path / "target", "onnx")
    with pytest.raises(HelixError, match="Valid: fp32, fp16, bf16"):
        convert(source, tmp_path / "target", "canonical", Options(dtype="int8"))
    config = CONFIGS["llama"] | {"num_hidden_layers": 3}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(HelixError, match=r"tensors of a llama model .* are missing"):
        convert(source, tmp_path / "target", "canonical")
    config = CONFIGS["llama"] | {"intermediate_size": 40}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        HelixError, match=r"has shape \[48, 32\], and config.json makes it \[40, 32\]"
    ):
        convert(source, tmp_path / "target", "canonical")


def test_sizes():
    """As people write them."""
    sizes = {"5GB": 5 * 10**9, "500 mb": 5 * 10**8, "1.5GiB": 3 << 29, "123": 123}
    assert {text: parse_size(text) for text in sizes} == sizes


def test_help_answers_without_torch():
    """`helix --help` and the converter's help must come at once."""
    program = """
from helix_megatron import cli
assert cli.main(["--help"]) == 0
try:
    cli.main(["convert", "--help"])
except SystemExit as left:
    assert left.code == 0
"""
    *text, heavy = printed_afresh(program)
    assert "convert checkpoints between Hugging Face" in "\n".join(text)
    assert "--intra-head-parallel-size" in "\n".join(text)
    assert heavy == "[]"


def test_the_command_line_names_its_subcommands(capsys):
    """A wrong one gets the nearest; none at all the list."""
    with pytest.raises(SystemExit, match="2"):
        cli.main(["konvert"])
    assert "Did you mean convert?" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "usage: helix" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0


def test_the_script_is_the_same_command(tmp_path):
    """`scripts/convert_checkpoint.py`, for a checkout that is not installed as a command."""
    source = write_hugging_face(tmp_path / "hf")
    command = [
        sys.executable,
        ROOT / "scripts" / "convert_checkpoint.py",
        source,
        tmp_path / "store",
    ]
    run = subprocess.run(
        [*command, "--to", "canonical"],
        capture_output=True,
        text=True,
        timeout=PROGRAM_LIMIT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"Wrote {tmp_path / 'store'}."
    assert "converting: 100%" in run.stdout
