"""Weights in blocks of fp8 and in MXFP4, as models are published, become those of transformers' own unpacking.

The oracle is `transformers`, which unpacks such files while it loads them, and, for blocks that end within a
matrix, arithmetic written out here.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from hf_models import MODELS, config_of, read_config
from safetensors.torch import load_file, save_file

from helix_megatron.checkpoint.convert import Options, convert
from helix_megatron.checkpoint.packed import open_weights, unpack_fp8
from helix_megatron.errors import HelixError
from helix_megatron.huggingface import from_pretrained, make_groups
from helix_megatron.model.packing import packing_of
from helix_megatron.plan.models import spec_of_config

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 4]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": ("deepseek v3", FP8),
    "fp8, experts": ("qwen3 moe", FP8),
    "fp8, one scale": (
        "ministral3",
        FP8 | {"weight_block_size": None, "activation_scheme": "static"},
    ),
    "mxfp4": ("gpt oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
}


def packed(kind: str, directory: Path) -> Path:
    """A tiny model with random packed weights, as publishers write them, in two files."""
    name, quantization = CONFIGS[kind]
    model_type, settings = MODELS[name]
    settings = settings | {"intermediate_size": 64}  # a multiple of MXFP4's 32
    config = transformers.AutoConfig.for_model(model_type, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    content = read_config(directory) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(content))
    drawn = torch.Generator().manual_seed(7)
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key in tensors if ".layers." in key and tensors[key].dim() > 1]:
        if kind == "mxfp4" and key.endswith("_proj"):
            tensors |= _mxfp4(key, tensors.pop(key), drawn)
        elif kind != "mxfp4" and not key.endswith("mlp.gate.weight"):
            tensors |= _fp8(key, tensors[key], quantization["weight_block_size"], drawn)
    _write(directory, tensors)
    return directory


def _fp8(
    key: str, weight: torch.Tensor, block: Any, drawn: torch.Generator
) -> dict[str, torch.Tensor]:
    grid = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)] if block else []
    made = {
        key: torch.randn(weight.shape, generator=drawn).mul(50).to(torch.float8_e4m3fn),
        f"{key}_scale_inv": torch.rand(grid, generator=drawn) * 1e-3 + 1e-4,
    }
    if not block:
        made[f"{key.removesuffix('.weight')}.activation_scale"] = torch.tensor(0.5)
    return made


def _mxfp4(key: str, weight: torch.Tensor, drawn: torch.Generator) -> dict[str, torch.Tensor]:
    experts, inside, outside = weight.shape
    shape = (experts, outside, inside // 32)
    scales = torch.randint(110, 126, shape, generator=drawn, dtype=torch.uint8)
    scales[0, 0, 0], scales[0, 1, 0] = 0, 254  # the smallest and the largest there is
    return {
        f"{key}_blocks": torch.randint(256, (*shape, 16), generator=drawn, dtype=torch.uint8),
        f"{key}_scales": scales,
    }


def _write(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Scales stand in another file than their weights, as happens at the seams of published files."""
    files: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for key, value in tensors.items():
        scales = key.endswith(("_scale_inv", "_scales"))
        files["b.safetensors" if scales else "a.safetensors"][key] = value.contiguous()
    for file, content in files.items():
        save_file(content, directory / file)
    (directory / "model.safetensors").unlink(missing_ok=True)
    table = {key: file for file, content in files.items() for key in content}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))


def by_transformers(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights as the library unpacks them."""
    kind = transformers.Mxfp4Config if _is_mxfp4(directory) else transformers.FineGrainedFP8Config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, quantization_config=kind(dequantize=True)
    )
    return model.state_dict()


def _is_mxfp4(directory: Path) -> bool:
    return read_config(directory)["quantization_config"]["quant_method"] == "mxfp4"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that differ in a bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.filterwarnings("ignore:config.json is written without quantization_config")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_conversion_unpacks_to_the_bit(tmp_path, capsys, kind, dtype):
    """A published file must become the weights that the library computes with, in the precision asked for."""
    source = packed(kind, tmp_path / "source")
    options = Options(dtype=None if dtype == "bf16" else dtype)
    convert(source, tmp_path / "canonical", "canonical", options)
    assert f"read from {CONFIGS[kind][1]['quant_method']}" in capsys.readouterr().out
    convert(tmp_path / "canonical", tmp_path / "plain", "huggingface", Options(verify=True))
    assert "quantization_config" not in read_config(tmp_path / "plain")
    precision = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=precision)
    assert same(plain.state_dict(), by_transformers(source, precision)) == []


def run_parts(source: str, plain: str, m: int, dtype: torch.dtype) -> list[list[str]]:
    """For each rank: what differs between a rank's parts of packed and of plain files."""
    groups = make_groups(dist.get_world_size(), m)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = from_pretrained(source, m, tensor_group=groups.tensor, dtype=dtype)
    wanted = from_pretrained(plain, m, tensor_group=groups.tensor, dtype=dtype)
    assert sum("are read from " in str(one.message) for one in said) == 1
    return same(found.state_dict(), wanted.state_dict())


@pytest.mark.filterwarnings("ignore:.* stay whole on every rank", "ignore:.*longest sequence here")
@pytest.mark.parametrize(
    ("kind", "ranks", "m"),
    [
        ("fp8", 2, 1),
        ("mxfp4", 4, 2),
        *(
            pytest.param(kind, 2, 2, marks=pytest.mark.full("conversion"))
            for kind in ("fp8, experts", "fp8, one scale")
        ),
    ],
)
def test_each_rank_unpacks_its_own_part(pool, tmp_path, kind, ranks, m):
    """A rank reads the blocks that its rows and columns lie in, also where a cut goes through a block."""
    source, plain = packed(kind, tmp_path / "source"), tmp_path / "plain"
    kind_of = transformers.Mxfp4Config if kind == "mxfp4" else transformers.FineGrainedFP8Config
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=kind_of(dequantize=True)
    )
    model.hf_quantizer = None
    model.save_pretrained(plain)
    arguments = str(source), str(plain), m, torch.bfloat16
    assert pool.run(run_parts, *arguments, world_size=ranks) == [[]] * ranks


def test_blocks_that_end_within_a_matrix():
    """DeepSeek-V3's latents have 576 rows, four and a half blocks; a part begins wherever a rank's does."""
    drawn = torch.Generator().manual_seed(3)
    values = torch.randn(9, 14, generator=drawn).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, generator=drawn)
    wanted = torch.tensor(
        [[float(values[r, c]) * float(scales[r // 4, c // 5]) for c in range(14)] for r in range(9)]
    )
    found = unpack_fp8(values, scales, (4, 5), torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
    for rows, columns in ((slice(3, 9), slice(0, 14)), (slice(5, 7), slice(4, 11))):
        part = unpack_fp8(
            values[rows, columns], scales, (4, 5), torch.float32, (rows.start, columns.start)
        )
        assert torch.equal(part, found[rows, columns])


def test_parts_of_packed_tensors(tmp_path):
    """Slices of a packed tensor are those of the unpacked one, at any border."""
    for kind, name in (
        ("fp8", "model.layers.1.mlp.experts.3.up_proj.weight"),
        ("mxfp4", "model.layers.1.mlp.experts.gate_up_proj"),
    ):
        files = open_weights(packed(kind, tmp_path / kind))
        whole = files.read(name)
        assert files.entry(name).shape == whole.shape
        *lead, rows, columns = whole.shape
        with files.part(name) as stored:
            assert torch.equal(stored[:], whole)
            for last in (slice(3, columns - 5), slice(columns - 1, columns)):
                for first in (slice(0, rows), slice(5, 18)):
                    index = (*[slice(None)] * len(lead), first, last)
                    assert torch.equal(stored[index], whole[index])
        if lead:
            assert torch.equal(files.read(name, 2), whole[2])


def _without_scales(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _of_another_shape(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:, :1]


def _not_finite(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.full_like(
        tensors[name], 255 if tensors[name].dtype == torch.uint8 else float("nan")
    )


def _of_another_dtype(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def _without_weight(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name.removesuffix("_scale_inv").replace("_scales", "_blocks")]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_scales, "a.safetensors is packed in .*, and its scales {scales} are missing"),
        (
            _of_another_shape,
            "tensor {scales} of .*b.safetensors is .* of shape .*, and {values} needs .* of shape",
        ),
        (_not_finite, "tensor {scales} of .*b.safetensors has scales that are no finite numbers"),
        (_of_another_dtype, "tensor {scales} of .*b.safetensors is torch.int32 of shape"),
        (
            _without_weight,
            "tensor {scales} of .*b.safetensors has scales of a weight that is not packed",
        ),
    ],
)
@pytest.mark.parametrize(
    ("kind", "values", "scales"),
    [
        ("fp8", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"),
        (
            "mxfp4",
            "model.layers.0.mlp.experts.down_proj_blocks",
            "model.layers.0.mlp.experts.down_proj_scales",
        ),
    ],
)
def test_damaged_scales_are_named(tmp_path, kind, values, scales, damage, said):
    """A weight with wrong scales is a model that speaks nonsense: file and tensor are named instead."""
    directory = packed(kind, tmp_path)
    tensors = load_file(tmp_path / "a.safetensors") | load_file(tmp_path / "b.safetensors")
    damage(tensors, scales)
    _write(directory, tensors)
    with pytest.raises(HelixError, match=said.format(scales=scales, values=values)):
        files = open_weights(directory)
        for name in files.names:
            files.read(name)


def test_fp8_without_a_word_about_scales(tmp_path):
    """Elements of fp8 are no weights by themselves: without their scales they would be read as such."""
    config = read_config(packed("fp8", tmp_path))
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        HelixError, match=r"torch\.float8_e4m3fn, and config.json has no quantization_config"
    ):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (
            {"quant_method": "compressed-tensors"},
            "quantized by 'compressed-tensors' .* Valid: fp8, mxfp4",
        ),
        (
            {"quant_method": "fp8", "expert_dtype": "fp4"},
            "quantized by 'fp8' with experts in 'fp4'",
        ),
        ({"bits": 4}, "quantized by None"),
        ("fp8", "quantization_config = 'fp8'. It must be an object"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "weight_block_size = .128. .* two whole numbers",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "two whole numbers"),
    ],
)
def test_other_methods_are_refused_by_name(quantization, said):
    """A method that is not known is told before hours of reading, in models that see, too."""
    for config in (
        {"quantization_config": quantization},
        {"text_config": {"quantization_config": quantization}},
    ):
        with pytest.raises(HelixError, match=said):
            packing_of(config)


def test_plans_count_what_is_read():
    """The planner sees the model as it will be in memory, and says so."""
    config = config_of("deepseek v3")
    with pytest.warns(UserWarning, match="unpacked when they are read, and counted so, in bf16"):
        model = spec_of_config("packed", config | {"quantization_config": FP8}, "")
    assert model.parameters == spec_of_config("plain", config, "").parameters
