"""Families whose files stack all experts of a layer, through every kind of checkpoint and back.

transformers makes the models and writes the files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_models import read_config, save
from safetensors.torch import load_file

from helix_megatron import cli

# Of 2 tensor parallel ranks; Megatron cannot cut experts with biases.
CUT = "--to ranks --tensor-model-parallel-size 2 --intra-head-parallel-size 2"
WHOLE_EXPERTS = " --expert-model-parallel-size 2 --expert-tensor-parallel-size 1"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.filterwarnings("ignore:.* sequences of more than")
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("gpt oss", WHOLE_EXPERTS),
        ("llama4", ""),
        pytest.param("granitemoe", "", marks=pytest.mark.full("conversion")),
        pytest.param("glm4 moe", WHOLE_EXPERTS, marks=pytest.mark.full("conversion")),
    ],
)
def test_there_and_back_gives_the_same_tensors(tmp_path, name, more):
    """A stacked tensor is read and written whole though it is many tensors in between."""
    save(name, tmp_path / "hf")
    steps = ("hf", "store", "ranks", "back")
    commands = ("--to canonical", CUT + more, "--to huggingface --shard-size 20kB")
    for source, target, command in zip(steps, steps[1:], commands, strict=False):
        paths = (str(tmp_path / source), str(tmp_path / target))
        assert cli.main(["convert", *paths, "--verify", *command.split()]) == 0
    wanted, found = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    assert read_config(tmp_path / "back") == read_config(tmp_path / "hf")
