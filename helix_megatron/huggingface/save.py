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

from helix_megatron.errors import HelixError
from helix_megatron.huggingface.cuts import Cut
from helix_megatron.huggingface.files import INDEX, WEIGHTS, expert_names, file_name
from helix_megatron.huggingface.shard import Sharding, sharding_of
from helix_megatron.model.families import cuttable_modules
from helix_megatron.model.families.modules import ExpertFiles
from helix_megatron.observe import purpose

MAX_FILE_BYTES = 5 * 10**9
STALE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def gather_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dictionary of the whole model, on the CPU, on rank 0 of the tensor group; elsewhere {}.

    Names and shapes are those of the library's model. Collective over the tensor group.
    """
    state = {name: whole for name, whole in whole_parameters(model) if whole is not None}
    if not state:
        return {}
    by_parameter = {id(p): state[name] for name, p in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)  # tied ones under both names
    return {name: by_parameter[id(parameter)] for name, parameter in everything}


def whole_parameters(model: Any) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole parameter on the CPU) of each parameter, on rank 0 of the tensor group; elsewhere None.

    A tied parameter comes once. Every rank of the tensor group must exhaust the iterator.
    """
    sharding = sharding_of(model)
    for name, parameter in model.named_parameters():
        data = parameter.data
        cut = None if sharding is None else sharding.plan.cuts.get(name)
        if sharding is not None and cut is not None:
            yield name, _collected(data, cut, sharding.tensor_group)
        else:
            yield name, data.cpu() if sharding is None or sharding.rank == 0 else None


def save_pretrained(
    model: Any, directory: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write a sharded model as plain `transformers` would have: its `from_pretrained` loads it.

    Rank 0 of the tensor group writes, tensor by tensor, and holds `max_file_bytes` and one weight at a time.
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
    for name, whole in whole_parameters(model):
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


class _Writer:
    """Collects tensors under the names of files and writes a file when it is full."""

    def __init__(self, model: Any, sharding: Sharding, directory: Path, max_bytes: int) -> None:
        self._model, self._sharding, self._directory = model, sharding, directory
        self._experts: ExpertFiles | None = cuttable_modules(model.config.model_type).experts
        self._max_bytes = max_bytes
        self._pending: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, whole: Tensor) -> None:
        for stored, tensor in self._as_stored(name, whole):
            if self._pending and self._bytes + tensor.nbytes > self._max_bytes:
                self._write()
            self._pending[stored] = tensor.contiguous()
            self._bytes += tensor.nbytes
            self._total += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending, name the files, and write the index and the configurations."""
        self._write()
        count = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else WEIGHTS
            self._temporary(number).rename(self._directory / final)
            weight_map |= dict.fromkeys(names, final)
        for stale in self._directory.glob("model*.safetensors*"):
            of_library = STALE.fullmatch(stale.name)
            if of_library and stale.name not in weight_map.values():
                stale.unlink()  # of an earlier model, or the index of one
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        self._write_configurations()

    def _write(self) -> None:
        from safetensors.torch import save_file

        self._directory.mkdir(parents=True, exist_ok=True)
        self._files.append(list(self._pending))
        save_file(self._pending, self._temporary(len(self._files)), metadata={"format": "pt"})
        self._pending, self._bytes = {}, 0

    def _temporary(self, number: int) -> Path:
        return self._directory / f"part-{number:05d}.safetensors.tmp"

    def _as_stored(self, name: str, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name in files, tensor): stacked experts one by one, as in the files of the Hub."""
        stacked = expert_names(name, self._experts)
        if stacked is None:
            yield file_name(name, self._experts), whole
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
        if self._model.can_generate():
            self._model.generation_config.save_pretrained(self._directory)
