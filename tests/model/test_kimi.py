"""Kimi K2: files of a type that transformers knows by their own code only, whose models are DeepSeek-V3's.

The oracle is transformers' DeepSeek-V3 with the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_models import MODELS, read_config, save
from safetensors.torch import load_file, save_file
from test_families import canonical

from helix_megatron import cli
from helix_megatron.inference.transformers_load import describe
from helix_megatron.plan.models import read_config as planned

# As in the published file; the code that it names does not exist here, and would fail if it were run.
OF_THE_FILE = {
    "model_type": "kimi_k2",
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "seq_aux": True,
}
ROPE = {
    "type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 1.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.fixture
def kimi(tmp_path, monkeypatch) -> tuple[Path, Path, torch.Tensor]:
    """(DeepSeek-V3, the same as Kimi K2, logits)."""
    kind, settings = MODELS["deepseek v3"]
    own = {
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
        "rope_parameters": ROPE | {"rope_theta": 50000.0},
    }
    monkeypatch.setitem(MODELS, "kimi", (kind, settings | own))
    deepseek, directory = tmp_path / "deepseek", tmp_path / "kimi"
    logits = save("kimi", deepseek)
    directory.mkdir()
    config = read_config(deepseek) | OF_THE_FILE
    del config["rope_parameters"]
    config |= {"rope_theta": 50000.0, "rope_scaling": ROPE}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").symlink_to(deepseek / "model.safetensors")
    return deepseek, directory, logits


@pytest.mark.filterwarnings("ignore:config.json .* is ignored", "ignore:.* which is not run")
def test_it_is_the_model_that_its_code_is(kimi, tmp_path):
    """Planned and converted as DeepSeek-V3, whose logits are tested; the way back is the file that it was."""
    deepseek, directory, _ = kimi
    (flags, tensors), (theirs, same) = canonical(directory), canonical(deepseek)
    assert flags == theirs and tensors.keys() == same.keys()
    assert (
        planned(directory / "config.json").parameters
        == planned(deepseek / "config.json").parameters
    )
    assert describe(directory) == describe(deepseek)
    there, back = str(tmp_path / "store"), tmp_path / "back"
    assert cli.main(["convert", str(directory), there, "--to", "canonical"]) == 0
    assert cli.main(["convert", there, str(back), "--to", "huggingface"]) == 0
    assert read_config(back) == read_config(directory)
    before, after = (load_file(path / "model.safetensors") for path in (directory, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:config.json .* is ignored", "ignore:.* which is not run")
def test_the_text_of_kimi_k2_5_is_the_same(kimi, tmp_path):
    """Its tensors stand under the language model's names, beside those of pictures."""
    _, directory, _ = kimi
    whole = {"model_type": "kimi_k25", "vision_config": {}, "text_config": read_config(directory)}
    tensors = load_file(directory / "model.safetensors")
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    named["vision_tower.patch_embed.weight"] = torch.zeros(1)
    (tmp_path / "k2_5").mkdir()
    (tmp_path / "k2_5" / "config.json").write_text(json.dumps(whole))
    save_file(named, tmp_path / "k2_5" / "model.safetensors")
    (flags, made), (theirs, same) = canonical(tmp_path / "k2_5"), canonical(directory)
    assert flags == theirs and made.keys() == same.keys()
    assert all(torch.equal(made[name], same[name]) for name in made)


def read_whole(directory: str) -> torch.Tensor:
    """Logits of the model, cut for these ranks."""
    import torch.distributed as dist
    from hf_models import tokens

    from helix_megatron.huggingface import from_pretrained, make_groups

    groups = make_groups(dist.get_world_size(), 1)
    model = from_pretrained(directory, 1, tensor_group=groups.tensor)
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


def test_it_is_cut_in_place(pool, kimi, tmp_path):
    """Without its own code, from files and from a checkpoint; `helix generate` reads it in the same way."""
    _, directory, expected = kimi
    store = str(tmp_path / "store")
    assert cli.main(["convert", str(directory), store, "--to", "canonical"]) == 0
    read = [pool.run(read_whole, path, world_size=2) for path in (str(directory), store)]
    for logits in read[0] + read[1]:
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
