"""A sharded model straight from safetensors: no rank ever holds the whole of it."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from helix_megatron.checkpoint.foreign import read_json, resolved
from helix_megatron.checkpoint.huggingface_form import ConvertedFiles
from helix_megatron.checkpoint.huggingface_io import snapshot_of
from helix_megatron.checkpoint.packed import open_weights
from helix_megatron.checkpoint.sources import kind_of, open_source
from helix_megatron.config import HelixConfig
from helix_megatron.core.kernels import AttentionKernel
from helix_megatron.core.kernels.sdpa import sdpa
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.files import (
    FileNames,
    Part,
    Weights,
    file_names,
    float_dtype,
    missing_names,
    read_experts,
    read_part,
    stored_weights,
)
from helix_megatron.huggingface.shard import shard
from helix_megatron.huggingface.sharding import sharding_of
from helix_megatron.model.families import FAMILIES, READ_AS, family_of
from helix_megatron.model.packing import KEY as PACKED
from helix_megatron.model.packing import packing_of
from helix_megatron.run.outcomes import on_every_rank

# Old files keep these tables, which models compute.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def from_pretrained(
    directory: str | Path,
    helix: HelixConfig | Mapping[str, Any] | int,
    *,
    tensor_group: ProcessGroup,
    intra_head_group: ProcessGroup | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    embeddings: bool = True,
    mlp: bool = True,
    kernel: AttentionKernel = sdpa,
    trust: bool = False,
    like: str | Path | None = None,
) -> Any:
    """A causal language model from a directory that `save_pretrained` wrote, sharded as by `shard`.

    Or from a checkpoint of training that can be converted to one: no files are written in between, and the
    first rank of each machine and of each tensor group compares the checkpoint's files with their manifest.

    The model is built on the meta device; each rank then reads its own part of every weight. A rank needs its
    part of the model and, while it is read, one weight of the files, or one tensor of the checkpoint beside
    what becomes of it. Collective over the tensor group.

    Args:
        directory: with config.json and safetensors; or a checkpoint, see `checkpoint.sources.open_source`.
        dtype: of the weights; the configuration's when None, or else the files'. Weights in blocks of fp8 or in
            MXFP4 are unpacked to it.
        device: where the weights go; the CPU when None. Process groups of NCCL also need
            `torch.cuda.set_device`.
        trust, like: see `checkpoint.sources.open_source`.
        others: see `shard`.

    Returns:
        The model in evaluation mode.

    Raises:
        HelixError: the directory has no such model, files and configuration disagree, or see `shard`. On all
            ranks of the tensor group alike.
    """
    asked = _dtype(dtype)
    verify = 0 in (tensor_group.rank(), int(os.environ.get("LOCAL_RANK", "-1")))
    opening = functools.partial(_open, directory, asked, trust=trust, like=like, verify=verify)
    config, files, dtype = on_every_rank(opening, tensor_group)
    if files.packing is not None:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"the weights in {files.directory} are read from {files.packing} and kept in {name}.",
            stacklevel=2,
        )
    model = empty_model(config, dtype=dtype)
    # While parameters are on the meta device, since the library initialises those, too; and before heads are
    # dealt, since `replace_mamba` takes this rank's part of a buffer, Falcon-H1's `mup_vector`.
    _fill_buffers(model, torch.device(device or "cpu"))
    model = shard(
        model,
        helix,
        tensor_group=tensor_group,
        intra_head_group=intra_head_group,
        embeddings=embeddings,
        mlp=mlp,
        kernel=kernel,
    )

    def fill() -> None:
        _fill_weights(model, files, torch.device(device or "cpu"))
        files.finish()
        _load_generation_config(model, files.sidecars)

    on_every_rank(fill, tensor_group)
    model.config.name_or_path = str(files.directory)
    return model.eval()


def _open(
    directory: str | Path, dtype: torch.dtype | None, **options: Any
) -> tuple[Any, Weights, torch.dtype]:
    """Configuration and weights of a directory, and the dtype to keep them in."""
    resolved(directory)
    path = snapshot_of(Path(directory))
    files: Weights
    if _holds_checkpoint(path):
        files = ConvertedFiles(open_source(path, **options))
        config = configuration_of(files)
        dtype = dtype or getattr(config, "dtype", None)
    else:
        if options["trust"] or options["like"] is not None:
            warnings.warn(
                f"{path} is a Hugging Face model: trust and like, which checkpoints have, change nothing.",
                stacklevel=2,
            )
        config = read_configuration(path)
        dtype = dtype or getattr(config, "dtype", None)
        files = open_weights(path, dtype)
    return config, files, dtype or float_dtype(files)


def _holds_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of training, which becomes a Hugging Face model as it is read."""
    there = directory.is_dir() and not (directory / "config.json").exists()
    return there and kind_of(directory) != "huggingface"


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise HelixError(
            f"dtype {dtype!r} is unknown. Valid: auto, bfloat16, float16, float32, float64, or a torch.dtype."
        )
    return found


def read_configuration(directory: Path) -> Any:
    """The configuration of a directory, as the library reads it, without what it says of packed weights.

    Raises:
        HelixError: no such directory, values that cannot be, or weights packed in a way that is not known.
    """
    if not (directory / "config.json").exists():
        raise HelixError(
            f"{directory} is no directory of a Hugging Face model: it has no config.json. Give the path of "
            "one; `hf download NAME --local-dir PATH` fetches a model from the Hub."
        )
    content = read_json(directory / "config.json")
    kind = content.get("model_type")
    if kind in FAMILIES.keys() | READ_AS.keys() if isinstance(kind, str) else True:
        family_of(content).check_values(content)
    packing_of(content)
    config = _library_config(content, directory)
    for one in (config, config.get_text_config()):
        vars(one).pop(PACKED, None)  # what is packed in files is unpacked as it is read
    return config


def configuration_of(files: ConvertedFiles) -> Any:
    """The configuration of a checkpoint's model, as the library reads it.

    Raises:
        HelixError: the library does not know the type, or refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(files.config))
        return _library_config(files.config, files.directory, Path(folder))


def empty_model(config: Any, **options: Any) -> Any:
    """A causal language model of a configuration, on the meta device; `options` are those of `from_config`.

    Raises:
        HelixError: the library has none of such a type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, __version__

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise HelixError(
            f"transformers {__version__} has no causal language model of type {config.model_type}. Give the "
            "files of its language model alone."
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def _library_config(content: Mapping[str, Any], directory: Path, folder: Path | None = None) -> Any:
    """The configuration of a model in the library's class, that of another type where `READ_AS` says so.

    Args:
        content: of config.json.
        directory: of the model.
        folder: with config.json, where that is not the model's directory.

    Raises:
        HelixError: the library does not know the type, or refuses it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    kind = content.get("model_type")
    if isinstance(kind, str) and kind not in READ_AS and kind not in CONFIG_MAPPING:
        raise HelixError(
            f"transformers {__version__} knows no models of type {kind} ({directory}), and code beside a model "
            "is never run. Install a release of transformers that has the type."
        )
    if kind not in READ_AS or kind in CONFIG_MAPPING:
        read = functools.partial(AutoConfig.from_pretrained, trust_remote_code=False)
        return _by_transformers(lambda: read(folder or directory), directory)
    kind = READ_AS[kind]
    known = {key: value for key, value in content.items() if key != "auto_map"}
    made = CONFIG_MAPPING[kind].from_dict
    return _by_transformers(lambda: made(known | {"model_type": kind}), directory)


def _by_transformers(read: Callable[[], Any], directory: Path) -> Any:
    """A configuration, as the library reads it; it checks values by exceptions of many kinds.

    Raises:
        HelixError: it refuses one.
    """
    try:
        return read()
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise HelixError(
            f"transformers cannot read the configuration in {directory}: {reason[:500]}. Correct it, or copy "
            "the model again from where it came."
        ) from error


def _fill_weights(model: Any, files: Weights, device: torch.device) -> None:
    """Put real parameters in the place of the empty ones, tied ones staying tied, and fill stored buffers."""
    sharding, spelling = sharding_of(model), file_names(model.config.model_type)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for last, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, last))

    stored = set(files.names)
    wanted = dict(stored_weights(model))  # of tied ones the first name, as in files
    names_of = {
        name: _names_in_files(name, spelling, stored, empty.size(0) if empty.dim() else 0)
        for name, empty in wanted.items()
    }
    missing = [n for names in names_of.values() for n in names if n not in stored]
    if missing:
        raise missing_names(missing, files.directory)
    _warn_of_unused(model, files, {n for names in names_of.values() for n in names})

    # In the order of the files, in which each tensor of a checkpoint is read once.
    place = {name: number for number, name in enumerate(files.names)}
    for name, empty in sorted(wanted.items(), key=lambda item: place[names_of[item[0]][0]]):
        cut = sharding.plan.cuts.get(name) if sharding is not None else None
        rank = sharding.rank if sharding is not None else 0
        part = Part(tuple(empty.shape), empty.dtype, device, cut, rank)
        stacked, names = spelling.stacked(name), names_of[name]
        if stacked is not None and names[0] in stacked.of(0):
            data = read_experts(files, stacked, part)
        else:
            data = read_part(files, names[0], part)
        if not isinstance(empty, nn.Parameter):
            empty.copy_(data)
            continue
        parameter = nn.Parameter(data, requires_grad=empty.requires_grad)
        vars(parameter).update(vars(empty))  # the marks of a cut parameter
        for module, last in owners[id(empty)]:
            setattr(module, last, parameter)


def _names_in_files(
    name: str, spelling: FileNames, stored: set[str], num_experts: int
) -> list[str]:
    """The tensors in files that make up a weight.

    Experts are one by one in files of the Hub; files that keep them stacked are read as well.
    """
    plain, stacked = spelling.plain(name), spelling.stacked(name)
    for one in (name, plain):
        if one in stored:
            return [one]
    if stacked is None:
        return [plain]
    return [n for expert in range(num_experts) for n in stacked.of(expert)]


def _warn_of_unused(model: nn.Module, files: Weights, used: set[str]) -> None:
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unused = sorted(
        name for name in set(files.names) - used - tied if not name.endswith(IGNORED_SUFFIXES)
    )
    if unused:
        warnings.warn(
            f"{files.directory} has weights that {type(model).__name__} has no use for: "
            f"{', '.join(unused[:4])}{', ...' if len(unused) > 4 else ''}.",
            stacklevel=4,
        )


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the tables that files do not keep, such as rotary frequencies, as the library does itself."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    with torch.device(device):
        model.initialize_weights()


def _load_generation_config(model: Any, directory: Path) -> None:
    from transformers import GenerationConfig

    path = directory / "generation_config.json"
    if path.exists():
        read_json(path)
        read = functools.partial(GenerationConfig.from_pretrained, directory)
        model.generation_config = _by_transformers(read, directory)
