"""One file per rank, as DeepSpeed writes them: `DIR/<tag>/mp_rank_00_model_states.pt` and `DIR/latest`.

A file holds `{"module": state_dict, …}` with the names that the rank's own `GPTModel.state_dict()` has. The
number is that of `RankLayout`: tensor parallel rank fastest, then expert, then pipeline parallel rank; without
experts it is Megatron's model parallel rank, which DeepSpeed's engine asks its `mpu` for.

`engine.load_checkpoint(DIR, load_module_only=True)` loads them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.catalog import CanonicalTensor, catalog
from helix_megatron.checkpoint.foreign import is_plain_name, read_name
from helix_megatron.checkpoint.huggingface_io import REOPEN_BYTES, same_bits, tensor_bytes
from helix_megatron.checkpoint.output import WRITE_BYTES
from helix_megatron.checkpoint.partition import Part, RankLayout
from helix_megatron.checkpoint.source import Source
from helix_megatron.checkpoint.torch_files import load_pt
from helix_megatron.errors import HelixError

LATEST = "latest"
MODULE = "module"
# All that DeepSpeed's engine wants of a checkpoint besides the weights, for training that begins at step 0.
ENGINE_STATE: dict[str, Any] = {
    "global_steps": 0,
    "global_samples": 0,
    "skipped_steps": 0,
    "dp_world_size": 1,
    "lr_scheduler": None,
    "optimizer": None,
    "data_sampler": None,
    "random_ltd": None,
}


def file_name(rank: int) -> str:
    """Of a rank's file, below the tag."""
    return f"mp_rank_{rank:02d}_model_states.pt"


# -------------------------------------------------------------------------- write


class StageFiles(contextlib.AbstractContextManager["StageFiles"]):
    """The files of all ranks of a pipeline stage, written tensor by tensor.

    All files have their final size from the beginning; a tensor's parts are written to their places in them. So
    each canonical tensor is read once, whatever the number of ranks.
    """

    def __init__(
        self,
        directory: Path,
        layout: RankLayout,
        stage: int,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.layout = layout
        tensors = catalog(layout.flags)
        first = stage * layout.ranks_per_stage
        self.ranks = range(first, first + layout.ranks_per_stage)
        self.paths = {rank: directory / file_name(rank) for rank in self.ranks}
        self.tensors = [
            t for t in tensors if any(layout.holds(t, layout.place(rank)) for rank in self.ranks)
        ]
        self._offsets: dict[int, dict[str, int]] = {}
        self._files: dict[int, int] = {}
        for rank, path in self.paths.items():
            path.unlink(missing_ok=True)  # a link must not be followed
            _write_skeleton(path, layout, rank, tensors, dtypes)
            self._offsets[rank] = _storage_offsets(path, layout, rank, tensors)
            self._files[rank] = os.open(path, os.O_WRONLY)

    def write(self, tensor: CanonicalTensor, value: Tensor) -> int:
        """Put every rank's part of a tensor in its place; the bytes of all parts."""
        written = 0
        for rank in self.ranks:
            place = self.layout.place(rank)
            name = self.layout.local_name(tensor, place)
            if name is not None:
                content = tensor_bytes(take(value, self.layout.part(tensor, place)))
                _write_at(self._files[rank], content, self._offsets[rank][name])
                written += len(content)
        return written

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __exit__(self, *_: object) -> None:
        self.close()


def take(value: Tensor, part: Part) -> Tensor:
    if part.axis is None:
        return value
    assert part.index is not None
    taken = value.index_select(part.axis, torch.from_numpy(part.index))
    if not part.padding:
        return taken
    rows = (part.padding, *value.shape[1:])
    return torch.cat([taken, torch.zeros(rows, dtype=value.dtype)])


def local_shapes(
    layout: RankLayout, rank: int, tensors: Sequence[CanonicalTensor]
) -> dict[str, tuple[CanonicalTensor, tuple[int, ...]]]:
    """Local name → tensor and the shape of its part, in the order of the file."""
    place = layout.place(rank)
    named = ((layout.local_name(tensor, place), tensor) for tensor in tensors)
    return {
        name: (tensor, layout.part(tensor, place).shape(tensor.shape))
        for name, tensor in named
        if name is not None
    }


def _write_skeleton(
    path: Path,
    layout: RankLayout,
    rank: int,
    tensors: Sequence[CanonicalTensor],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """What `torch.save` would write, with a hole where each tensor's bytes belong."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        module: dict[str, Any] = {
            name: torch.empty(shape, dtype=dtypes[tensor.name])
            for name, (tensor, shape) in local_shapes(layout, rank, tensors).items()
        }
    for name in layout.local_extra_states(tensors, layout.place(rank)):
        module[name] = None
    state = {MODULE: module, **ENGINE_STATE, "mp_world_size": layout.num_ranks}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)


def _storage_offsets(
    path: Path, layout: RankLayout, rank: int, tensors: Sequence[CanonicalTensor]
) -> dict[str, int]:
    """Local name → where its bytes are in the file: `torch.save` numbers tensors in the order of the pickle."""
    reader: Any = torch._C.PyTorchFileReader(str(path))
    names = enumerate(local_shapes(layout, rank, tensors))
    return {name: reader.get_record_offset(f"data/{number}") for number, name in names}


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while len(content):
        count = os.pwrite(file, content[:WRITE_BYTES], offset)
        content, offset = content[count:], offset + count


# --------------------------------------------------------------------------- read


class RankReader(Source):
    """The canonical tensors of a directory with one file per rank.

    Args:
        directory: with `latest` in it, or with the rank files themselves.
        layout: which rank holds what.
        trust: read pickles that could run code.

    Raises:
        HelixError: a file is missing, damaged or refused, or of another layout.
    """

    kind = "ranks"

    def __init__(self, directory: Path | str, layout: RankLayout, *, trust: bool = False) -> None:
        super().__init__(directory, layout.flags)
        self.layout, self._trust = layout, trust
        self._folder = rank_directory(self.directory)
        found = sorted(path.name for path in self._folder.glob("mp_rank_*_model_states.pt"))
        expected = [file_name(rank) for rank in range(layout.num_ranks)]
        missing = [name for name in expected if name not in found]
        if missing or len(found) > len(expected):
            problem = f"lacks {missing[0]}" if missing else f"has {len(found)} rank files"
            raise HelixError(
                f"{self._folder} {problem}, and a layout of {layout.tensor} tensor × {layout.pipeline} "
                f"pipeline parallel ranks has {layout.num_ranks} files. Copy what is missing, or "
                "correct the layout."
            )
        self._modules: dict[int, dict[str, Any]] = {}
        self._served = 0

    def dtype(self, name: str) -> torch.dtype:
        """As the first rank with the tensor has it."""
        tensor = self.tensors[name]
        for rank in range(self.layout.num_ranks):
            if self.layout.holds(tensor, self.layout.place(rank)):
                return self._own(rank, tensor)[1].dtype
        raise AssertionError(f"no rank holds {name}")

    def read(self, name: str) -> Tensor:
        """As in `Source`, put together from all ranks; those that should hold the same part must do so."""
        tensor = self.tensors[name]
        if self._served > REOPEN_BYTES:
            self._modules.clear()  # unmaps the files, whose pages count as memory in use
            self._served = 0
        result = torch.empty(tensor.shape, dtype=self.dtype(name))
        self._served += result.nbytes
        written: dict[bytes, tuple[int, Tensor]] = {}
        for rank in range(self.layout.num_ranks):
            place = self.layout.place(rank)
            if not self.layout.holds(tensor, place):
                continue
            local, value = self._own(rank, tensor)
            if value.dtype != result.dtype:
                raise HelixError(
                    f"{local} is {value.dtype} in {file_name(rank)} and {result.dtype} in another rank's file."
                )
            part = self.layout.part(tensor, place)
            key = b"" if part.index is None else part.index.tobytes()
            if key in written:
                first, other = written[key]
                if not same_bits(value, other):
                    raise HelixError(
                        f"{name} must be equal in {file_name(first)} and {file_name(rank)} of "
                        f"{self._folder}, and is not. The files are of different checkpoints, or a rank went "
                        "astray in training."
                    )
                continue
            written[key] = rank, value
            if part.axis is None:
                result.copy_(value)
            else:
                assert part.index is not None
                index = torch.from_numpy(part.index)
                result.index_copy_(part.axis, index, value.narrow(part.axis, 0, len(index)))
        return result

    def _own(self, rank: int, tensor: CanonicalTensor) -> tuple[str, Tensor]:
        place = self.layout.place(rank)
        local = self.layout.local_name(tensor, place)
        assert local is not None
        module = self._module(rank)
        value = module.get(local)
        path = self._folder / file_name(rank)
        if not isinstance(value, Tensor):
            raise HelixError(
                f"{path} lacks {local}. It is of another model or layout than its manifest says."
            )
        expected = self.layout.part(tensor, place).shape(tensor.shape)
        if tuple(value.shape) != expected:
            raise HelixError(
                f"{path} has {local} of shape {list(value.shape)}, and the layout makes it {list(expected)}. "
                "It is of another model or layout than its manifest says."
            )
        return local, value

    def _module(self, rank: int) -> dict[str, Any]:
        if rank not in self._modules:
            path = self._folder / file_name(rank)
            state = load_pt(path, mmap=True, trust=self._trust)
            module = state.get(MODULE) if isinstance(state, dict) else None
            if not isinstance(module, dict):
                raise HelixError(f"{path} has no {MODULE!r}: DeepSpeed did not write it.")
            self._modules[rank] = module
        return self._modules[rank]


def rank_directory(directory: Path) -> Path:
    """Where the rank files are: the directory itself, or the tag that `latest` names."""
    latest = directory / LATEST
    if not latest.is_file():
        return directory
    tag = read_name(latest, "Copy the checkpoint again from where it came.")
    if not is_plain_name(tag) or not (directory / tag).is_dir():
        raise HelixError(
            f"{latest} names {tag[:40]!r}, which is no directory in {directory}. Copy the checkpoint again "
            "from where it came."
        )
    return directory / tag
