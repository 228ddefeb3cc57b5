"""Whole weights again from a sharded model, one tensor at a time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_megatron.checkpoint.foreign import read_json
from helix_megatron.checkpoint.huggingface_io import (
    INDEX,
    Entry,
    SafetensorsFile,
    make_index,
    shards,
)
from helix_megatron.core.observe import purpose
from helix_megatron.errors import HelixError
from helix_megatron.huggingface.cuts import Cut
from helix_megatron.huggingface.files import file_names, stored_weights
from helix_megatron.huggingface.sharding import Sharding, sharding_of
from helix_megatron.model.families.positions import older_spelling

MAX_FILE_BYTES = 5 * 10**9
STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def gather_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dictionary of the whole model, on the CPU, on rank 0 of the tensor group; elsewhere {}.

    Names and shapes are those of the library's model. Collective over the tensor group.
    """
    state = {name: whole for name, whole in whole_weights(model) if whole is not None}
    if not state:
        return {}
    by_parameter = {id(p): state[name] for name, p in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)  # tied ones under both names
    return state | {name: by_parameter[id(parameter)] for name, parameter in everything}


def whole_weights(model: Any) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole weight on the CPU) of each weight, on rank 0 of the tensor group; elsewhere None.

    Weights are parameters and stored buffers. A tied parameter comes once. Every rank of the tensor group must
    exhaust the iterator.
    """
    sharding = sharding_of(model)
    for name, parameter in _in_order_of_files(model):
        data = parameter.data
        cut = None if sharding is None else sharding.plan.cuts.get(name)
        if sharding is not None and cut is not None:
            yield name, _collected(data, cut, sharding.tensor_group)
        else:
            yield name, data.cpu() if sharding is None or sharding.rank == 0 else None


def _in_order_of_files(model: Any) -> list[tuple[str, Tensor]]:
    """The weights, those with larger elements first: so do `SafetensorsFile`s have them."""
    return sorted(stored_weights(model), key=lambda pair: -pair[1].element_size())


def save_pretrained(
    model: Any, directory: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a sharded model as plain `transformers` would have: its `from_pretrained` loads it.

    Rank 0 of the tensor group writes, tensor by tensor, and holds one weight at a time.
    Collective over the tensor group; of several replicas, that of global rank 0 writes.

    Args:
        directory: made if it does not exist.
        max_file_bytes: largest size of a file of weights.

    Raises:
        HelixError: the directory cannot be written; on every rank.
    """
    sharding, directory = sharding_of(model), Path(directory)
    if sharding is None:
        model.save_pretrained(directory)
        return
    if 0 not in dist.get_process_group_ranks(sharding.tensor_group):
        return
    writer = _Writer(model, sharding, directory, max_file_bytes) if sharding.rank == 0 else None
    error = None
    for name, whole in whole_weights(model):
        if writer is not None and whole is not None and error is None:
            error = _error_of(lambda w=writer, n=name, t=whole: w.add(n, t))
    if writer is not None and error is None:
        error = _error_of(writer.finish)
    told = [error]
    dist.broadcast_object_list(told, group=sharding.tensor_group, group_src=0)
    if told[0] is not None:
        raise HelixError(f"{directory} could not be written: {told[0]}. Give another directory.")


def _error_of(action: Any) -> str | None:
    """What went wrong, in words; the other ranks are still sending, so that it is told later."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _collected(part: Tensor, cut: Cut, group: ProcessGroup) -> Tensor | None:
    """The whole tensor on the CPU on the group's rank 0; None elsewhere."""
    with purpose("tensor/save"):
        if group.rank() != 0:
            dist.send(part.contiguous(), group=group, group_dst=0)
            return None
        whole = torch.empty(cut.whole_shape(part.shape), dtype=part.dtype)
        cut.put(whole, part, 0)
        for rank in range(1, group.size()):
            received = part.new_empty(cut.local_shape(whole.shape, rank))
            dist.recv(received, group=group, group_src=rank)
            cut.put(whole, received, rank)
    return whole


def _add_older_spellings(path: Path) -> None:
    """transformers 4 takes base 10000 without scaling where it finds only the newer keys of config.json."""
    config = read_json(path)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config |= older_spelling(rope)
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


class _Writer:
    """Writes files of safetensors beside those of an earlier model, and puts them in place at the end."""

    def __init__(self, model: Any, sharding: Sharding, directory: Path, max_bytes: int) -> None:
        self._model, self._sharding, self._directory = model, sharding, directory
        self._spelling = file_names(model.config.model_type)
        entries = []
        for name, parameter in _in_order_of_files(model):
            cut = sharding.plan.cuts.get(name)
            shape = parameter.shape if cut is None else cut.whole_shape(parameter.shape)
            whole = torch.empty(shape, dtype=parameter.dtype, device="meta")
            entries += [Entry.of(*pair) for pair in self._as_stored(name, whole)]
        self._files = shards(entries, max_bytes)
        self._left = list(self._files)
        self._file: SafetensorsFile | None = None

    def add(self, name: str, whole: Tensor) -> None:
        for _, tensor in self._as_stored(name, whole):
            if self._file is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                file = self._left.pop(0)
                self._file = SafetensorsFile(self._temporary(file), self._files[file])
            self._file.add(tensor)
            if not self._file.missing:
                self._file.finish()
                self._file = None

    def finish(self) -> None:
        """Put the files in place, and write the index and the configurations."""
        for file in self._files:
            self._temporary(file).rename(self._directory / file)
        for stale in self._directory.glob("model*.safetensors*"):
            if STALE.fullmatch(stale.name) and stale.name not in self._files:
                stale.unlink()  # of an earlier model, or the index of one
        if len(self._files) > 1:
            (self._directory / INDEX).write_bytes(make_index(self._files))
        self._write_configurations()

    def _temporary(self, file: str) -> Path:
        return self._directory / f"{file}.tmp"

    def _as_stored(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name in files, tensor): stacked experts one by one, as in the files of the Hub."""
        stacked = self._spelling.stacked(name)
        if stacked is None:
            yield self._spelling.plain(name), whole
            return
        for expert, matrices in enumerate(whole):
            pieces = matrices.chunk(len(stacked.templates))
            yield from zip(stacked.of(expert), pieces, strict=True)

    def _write_configurations(self) -> None:
        config = copy.deepcopy(self._model.config)
        config._attn_implementation = self._sharding.attention_before
        vars(config).pop("distributed_config", None)  # the Trainer's, of this run
        config.dtype = str(self._model.dtype).removeprefix("torch.")
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(self._directory)
        _add_older_spellings(self._directory / "config.json")
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(self._directory)
