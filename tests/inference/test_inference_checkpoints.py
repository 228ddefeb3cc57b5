"""Whose code computes a checkpoint of training, and what the command says of one that is damaged.

tests/model/test_family_generation.py compares the tokens.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from hf_models import save
from waiting import run_python

from helix_megatron import cli
from helix_megatron.errors import HelixError
from helix_megatron.inference.arguments import TransformersRun, inference_config
from helix_megatron.inference.command import build_parser


def options_of(directory: Any, *flags: str) -> dict[str, Any]:
    return vars(build_parser().parse_args(["--load", str(directory), *flags]))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Checkpoints that were converted from a model with gated delta nets, and from one without."""
    directory = tmp_path_factory.mktemp("stores")
    for name in ("qwen3 next", "qwen3"):
        save(name, directory / "hf" / name)
        source, target = (str(directory / kind / name) for kind in ("hf", "canonical"))
        assert cli.main(["convert", source, target, "--to", "canonical"]) == 0
    return directory / "canonical"


def test_whose_code_computes_a_checkpoint(stores):
    """megatron-core's, except where the engine does not know the layers, or a flag says otherwise."""
    config = inference_config(options_of(stores / "qwen3 next", "--dtype", "bf16"), 2)
    assert isinstance(config.run, TransformersRun)
    assert (config.load_kind, config.dtype, config.vocab_size) == ("canonical", "bf16", 91)
    assert config.load_path == str(stores / "qwen3 next" / "release")
    for flags, other in ((), False), (("--implementation", "transformers"), True):
        config = inference_config(options_of(stores / "qwen3", *flags), 2)
        assert isinstance(config.run, TransformersRun) is other


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--implementation", "megatron"], "does not compute models with gated delta nets"),
        (["--num-layers", "3"], "--num-layers: the code of transformers computes this model"),
        (["--ckpt-step", "7"], "holds no complete checkpoint"),
    ],
)
def test_flags_that_do_not_fit_a_checkpoint_are_refused(stores, flags, text):
    """What the checkpoint says is what is computed."""
    with pytest.raises(HelixError, match=text):
        inference_config(options_of(stores / "qwen3 next", *flags), 1)


@pytest.mark.full("inference")
def test_a_damaged_checkpoint_ends_all_ranks(stores, tmp_path):
    """Only the first rank of a machine compares files with their manifest; the command ends, and names one."""
    shutil.copytree(stores / "qwen3 next", tmp_path / "store")
    path = tmp_path / "store" / "release" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    command = ["generate", "--load", str(tmp_path / "store"), "--prompt-tokens", "[1, 2]"]
    done = run_python(["-m", "helix_megatron.cli", *command, "--nproc-per-node", "2"])
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert said.count("__0_0.distcp has changed") == 1 and "Traceback" not in said


def test_segments_of_heads_become_heads(tmp_path):
    """Weights of segment-local attention are an ordinary model with more heads, whosever code computes it."""
    paths = [str(tmp_path / name) for name in ("hf", "local")]
    save("llama 2", tmp_path / "hf")
    local = ["--attention", "segment-local", "--segments", "2", "--allow-quality-loss"]
    assert cli.main(["convert", *paths, "--to", "canonical", *local]) == 0
    config = inference_config(options_of(paths[1], "--implementation", "transformers"), 2)
    assert "attention of 2 segments: it is loaded as what it is" in config.notes[1]
    assert {form.heads for form in config.run.described.attention.values()} == {8}
