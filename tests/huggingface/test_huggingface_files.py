"""A sharded model straight from files equals one that is cut after loading, and is saved whole, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_transformers import BY_FORM, randomize, tiny_config, tiny_model, tokens

from helix_megatron.core.meter import measure
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import from_pretrained, make_groups, save_pretrained, shard
from helix_megatron.huggingface.load import read_configuration

SPELLINGS = ("glm4_moe", "minimax_m2", "granitemoe")
FAMILIES = ["llama, cut queries", "qwen2", "qwen3", "gemma", "mixtral", "qwen2_moe", "qwen3_moe"]


def saved(family: str, directory: Path, **options: Any) -> Any:
    """A model that plain transformers wrote, in several files."""
    model = tiny_model(family)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(directory, max_shard_size="20KB", **options)
    return model


def run_round_trip(family: str, m: int, source: str, target: str) -> dict[str, Any]:
    groups = make_groups(dist.get_world_size(), m)
    model = from_pretrained(
        source, m, tensor_group=groups.tensor, intra_head_group=groups.intra_head
    )
    cut = shard(tiny_model(family), m, tensor_group=groups.tensor)
    state, wanted = model.state_dict(), cut.state_dict()
    buffers = dict(cut.named_buffers())
    found: dict[str, Any] = {
        "names": state.keys() == wanted.keys(),
        "different": [name for name in wanted if not torch.equal(state[name], wanted[name])],
        "buffers": [n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])],
        "marks": [
            name
            for name, parameter in cut.named_parameters()
            if vars(parameter) != vars(model.get_parameter(name))
        ],
        "max_new_tokens": model.generation_config.max_new_tokens,
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "training": model.training,
    }
    with torch.no_grad():
        found["logits"] = torch.equal(model(tokens()).logits, cut(tokens()).logits)
    save_pretrained(model, target, max_file_bytes=20_000)
    return found


@pytest.mark.filterwarnings("ignore:each rank has")
@pytest.mark.parametrize("family", FAMILIES)
def test_from_files_and_back(pool, tmp_path, family):
    """Plain transformers must load what was saved and find every bit of the model that it wrote itself."""
    whole = saved(family, tmp_path / "source")
    world_size, m = (4, 2) if "llama" in family or "qwen3" in family else (2, 2)
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    for found in pool.run(run_round_trip, family, m, source, target, world_size=world_size):
        assert found == {
            "names": True,
            "different": [],
            "buffers": [],
            "marks": [],
            "max_new_tokens": 7,
            "tied": whole.config.tie_word_embeddings,
            "training": False,
            "logits": True,
        }
    back = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert back.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert back.generation_config.max_new_tokens == 7
    # The same tensors under the same names as the library writes, in whatever files.
    assert stored(tmp_path / "target") == stored(tmp_path / "source")
    assert len(list((tmp_path / "target").glob("model-*.safetensors"))) > 1
    config, written = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "target")
    )
    older = {"rope_theta", "rope_scaling", "torch_dtype"}  # which transformers 4 reads
    assert {key: written[key] for key in config} == config
    assert written.keys() - config.keys() <= older <= written.keys()
    assert written["rope_theta"] == back.config.rope_parameters["rope_theta"]


@pytest.mark.filterwarnings(
    "ignore:each rank has", "ignore:.* stay whole on every rank:UserWarning"
)
@pytest.mark.parametrize(
    "family",
    [
        # The quick tier has each spelling of experts, renamed weights, and buffers that files hold, of types
        # that the oldest transformers has, too.
        pytest.param(family, marks=[pytest.mark.full("conversion")] * (family not in SPELLINGS))
        for family in BY_FORM
    ],
)
def test_types_cut_by_form_from_files_and_back(pool, tmp_path, family):
    """What files call a weight is read from the library's own table: the types of 2026 load from the Hub."""
    whole = saved(family, tmp_path / "source")
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    for found in pool.run(run_round_trip, family, 2, source, target, world_size=2, timeout=300):
        assert not found["different"] and not found["buffers"] and not found["marks"]
        assert found["names"] and found["logits"]
    back = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert back.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(back[name], value), name
    assert stored(tmp_path / "target") == stored(tmp_path / "source")


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors in a directory."""
    shapes = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def run_other_precision(source: str, target: str) -> list[Any]:
    groups = make_groups(2, 2)
    model = from_pretrained(source, 2, tensor_group=groups.tensor, dtype="bfloat16")
    save_pretrained(model, target)
    return [model.dtype, model.model.rotary_emb.inv_freq.dtype]


def test_another_precision_in_one_file(pool, tmp_path):
    """Weights are cast as they are read; rotary tables stay fp32, as in the library. An earlier model's files
    in the directory must not be taken for the new one's."""
    whole = saved("llama", tmp_path / "source")
    saved("qwen3", tmp_path / "target")
    arguments = (str(tmp_path / "source"), str(tmp_path / "target"))
    found = pool.run(run_other_precision, *arguments, world_size=2)
    assert found == [[torch.bfloat16, torch.float32]] * 2
    assert sorted(path.name for path in (tmp_path / "target").glob("model*")) == [
        "model.safetensors"
    ]
    back = load_file(tmp_path / "target" / "model.safetensors")
    for name, value in whole.state_dict().items():
        assert torch.equal(back[name], value.bfloat16()), name


def run_from(source: str) -> dict[str, torch.Tensor]:
    groups = make_groups(2, 2)
    model = from_pretrained(source, 2, tensor_group=groups.tensor)
    return {name: parameter.data for name, parameter in model.named_parameters()}


def test_files_with_stacked_experts(pool, tmp_path):
    """Some tools write experts as the library keeps them in memory."""
    whole = saved("mixtral", tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    state = {name: value.contiguous() for name, value in whole.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts = pool.run(run_from, str(tmp_path), world_size=2)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    gate, up = state[name].chunk(2, dim=1)
    for rank, part in enumerate(parts):
        wanted = torch.cat([gate.chunk(2, dim=1)[rank], up.chunk(2, dim=1)[rank]], dim=1)
        assert torch.equal(part[name], wanted)


def run_alone(source: str) -> list[Any]:
    model = from_pretrained(source, 1, tensor_group=make_groups(1, 1).tensor)
    wanted = tiny_model("qwen3").state_dict()
    with pytest.raises(HelixError, match="dtype 'float99' is unknown"):
        from_pretrained(source, 1, tensor_group=make_groups(1, 1).tensor, dtype="float99")
    return [
        [name for name in wanted if not torch.equal(model.state_dict()[name], wanted[name])],
        model.config._attn_implementation,
    ]


def test_one_rank_reads_a_whole_model(pool, tmp_path):
    """The same script on one process is the library's model."""
    saved("qwen3", tmp_path)
    assert pool.run(run_alone, str(tmp_path), world_size=1) == [[[], "sdpa"]]


def run_save_to(target: str) -> str:
    model = shard(tiny_model("llama"), 2, tensor_group=make_groups(2, 2).tensor)
    with pytest.raises(HelixError) as error:
        save_pretrained(model, target)
    return str(error.value)


def test_every_rank_learns_that_saving_failed(pool, tmp_path):
    """If only the rank that writes knew, the others would wait for it until a timeout."""
    (tmp_path / "file").write_text("")
    for text in pool.run(run_save_to, str(tmp_path / "file" / "below"), world_size=2):
        assert "could not be written: NotADirectoryError" in text
        assert text.endswith("Give another directory.")


def run_replicas(target: str) -> tuple[int, int]:
    groups = make_groups(2, 2)
    model = shard(tiny_model("llama"), 2, tensor_group=groups.tensor)
    if dist.get_rank() >= 2:
        randomize(model)  # a replica that went astray must not be what is saved
    with measure() as meter:
        save_pretrained(model, target)
    return dist.get_rank(), meter.calls("tensor/save")


def test_of_several_replicas_one_writes(pool, tmp_path):
    """Two writers of one file leave neither's model."""
    for rank, calls in pool.run(run_replicas, str(tmp_path), world_size=4):
        assert (calls > 0) == (rank < 2)
    back = load_file(tmp_path / "model.safetensors")
    for name, value in tiny_model("llama").state_dict().items():
        assert torch.equal(back[name], value), name


def run_load(source: str) -> str:
    groups = make_groups(2, 2)
    with pytest.raises(HelixError) as error:
        from_pretrained(source, 2, tensor_group=groups.tensor)
    return str(error.value)


def _no_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def _pickles(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"")


def _other_sizes(directory: Path) -> None:
    tiny_config("llama", intermediate_size=64).save_pretrained(directory)


def _one_lost(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = directory / content["weight_map"].pop("model.norm.weight")
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    index.write_text(json.dumps(content))


def _damaged_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{")


def _truncated(directory: Path) -> None:
    for path in directory.glob("model-*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])


def _other_family(directory: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(directory)


def _quantized(directory: Path) -> None:
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.save_pretrained(directory)


def _no_causal_model(directory: Path) -> None:
    transformers.CLIPConfig().save_pretrained(directory)


def _of_tomorrow(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "of_tomorrow"}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_config, "is no directory of a Hugging Face model: it has no config.json"),
        (_pickles, "holds pickled weights (pytorch_model.bin), which can execute code"),
        (_other_sizes, "has shape (48,), and the configuration asks for (64,)"),
        (_one_lost, "lacks model.norm.weight, which its config.json asks for"),
        (_damaged_index, "is damaged: no valid JSON"),
        (_truncated, "safetensors is damaged: "),
        (_other_family, "attention of class GPT2Attention has none of o_proj, out_proj, dense"),
        (_no_causal_model, "has no causal language model of type clip"),
        (_of_tomorrow, "knows no models of type of_tomorrow"),
        (_quantized, "weights are quantized by 'bitsandbytes' (quantization_config), which cannot"),
    ],
)
def test_what_cannot_be_loaded_says_why(pool, tmp_path, damage, said):
    """A wrong directory must not end in a model with random weights, nor in a traceback from a library."""
    saved("llama", tmp_path)
    damage(tmp_path)
    for text in pool.run(run_load, str(tmp_path), world_size=2):
        assert said in text


def test_how_a_text_tower_is_packed_is_not_kept(tmp_path):
    """Its weights are unpacked as they are read, and saved so."""
    text = tiny_config("gemma3").to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    transformers.Gemma3Config(text_config=text).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["quantization_config"]
    config = read_configuration(tmp_path)
    assert "quantization_config" not in config.to_dict()["text_config"]


def run_unused(source: str) -> None:
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no use for: model.extra.weight"):
        from_pretrained(source, 2, tensor_group=make_groups(2, 2).tensor)


def test_weights_without_use_are_named(pool, tmp_path):
    """A checkpoint of a larger architecture would otherwise seem to load."""
    saved("llama", tmp_path)
    save_file({"model.extra.weight": torch.zeros(3)}, tmp_path / "extra.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "extra.safetensors"
    index.write_text(json.dumps(content))
    pool.run(run_unused, str(tmp_path), world_size=2)
