"""A rank's parts of the weights in safetensors files, and the names that weights have in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from helix_megatron.checkpoint.huggingface_io import HuggingFaceReader
from helix_megatron.core.layout import contiguous_runs
from helix_megatron.errors import HelixError, listed
from helix_megatron.huggingface.cuts import Cut, block_cut
from helix_megatron.model.families.modules import ExpertFiles


@dataclass(frozen=True)
class Part:
    """What one rank wants of a parameter: `cut` for rank `rank`, or all of it where `cut` is None."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cut: Cut | None
    rank: int

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.shape if self.cut is None else self.cut.whole_shape(self.shape)


def float_dtype(files: HuggingFaceReader) -> torch.dtype:
    """Of the first tensor that has floating-point elements; fp32 if there is none."""
    dtypes = (files.entry(name).dtype for name in sorted(files.names))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def read_part(files: HuggingFaceReader, name: str, part: Part) -> Tensor:
    """A rank's part of the tensor called `name`."""
    out = part.empty()
    _read_into(out, files, name, part.whole_shape, part.cut, part.rank)
    return out


def read_experts(files: HuggingFaceReader, names: ExpertNames, part: Part) -> Tensor:
    """A rank's part of stacked experts [E, rows, columns] from files that hold each expert by itself.

    `part.cut` is of the stacked parameter: two blocks of rows (gate, up), or columns (down).
    """
    out = part.empty()
    for expert in range(out.size(0)):
        matrices = names.of(expert)
        rows, columns = part.whole_shape[1] // len(matrices), part.whole_shape[2]
        cut = None
        if part.cut is not None:
            dim = part.cut.dim - 1
            cut = block_cut(dim, (rows, columns)[dim], len(part.cut.indices))
        for matrix, piece in zip(matrices, out[expert].chunk(len(matrices)), strict=True):
            _read_into(piece, files, matrix, (rows, columns), cut, part.rank)
    return out


def _read_into(
    out: Tensor,
    files: HuggingFaceReader,
    name: str,
    whole_shape: tuple[int, ...],
    cut: Cut | None,
    rank: int,
) -> None:
    """Copy a rank's part into `out`, run by run.

    The file is opened anew for every tensor: pages of a mapped file count as this process's memory while the
    mapping lasts, and columns touch all pages of a tensor.
    """
    found = files.entry(name).shape
    if found != whole_shape:
        raise HelixError(
            f"{name} in {files.directory} has shape {found}, and the configuration asks for {whole_shape}. "
            "Take config.json and weights of one model."
        )
    with files.open(files.file(name)) as file:
        stored = file.get_slice(name)
        if cut is None:
            out.copy_(stored[:])
            return
        before: tuple[slice, ...] = (slice(None),) * cut.dim
        start = 0
        for first, length in contiguous_runs(cut.indices[rank]):
            read = stored[(*before, slice(first, first + length))]
            out.narrow(cut.dim, start, length).copy_(read)
            start += length


@dataclass(frozen=True)
class ExpertNames:
    """The names in files of one stacked parameter's matrices, with `{}` for the number of the expert."""

    templates: tuple[str, ...]

    def of(self, expert: int) -> list[str]:
        return [template.format(expert) for template in self.templates]


def file_name(name: str, experts: ExpertFiles | None) -> str:
    """The name in files of a parameter that is not stacked."""
    return name if experts is None else name.replace(".mlp.", experts.block)


def expert_names(name: str, experts: ExpertFiles | None) -> ExpertNames | None:
    """The names in files of a stacked parameter; None for any other."""
    if experts is None:
        return None
    path, _, last = file_name(name, experts).rpartition(".")
    if not path.endswith(".experts"):
        return None
    matrices = {"gate_up_proj": (experts.gate, experts.up), "down_proj": (experts.down,)}
    return ExpertNames(tuple(f"{path}.{{}}.{matrix}.weight" for matrix in matrices[last]))


def missing_names(missing: list[str], directory: Path) -> HelixError:
    """The error of weights that a model needs and files do not have."""
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return HelixError(
        f"{directory} lacks {listed(missing[:4])}{more}, which its config.json asks for. Take config.json and "
        "weights of one model."
    )
