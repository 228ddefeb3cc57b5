"""A rank's parts of the weights in safetensors files, and the names that weights have in files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.huggingface_form import ConvertedFiles
from helix_megatron.checkpoint.huggingface_io import HuggingFaceReader
from helix_megatron.core.layout import contiguous_runs
from helix_megatron.errors import HelixError, listed
from helix_megatron.huggingface.cuts import Cut, block_cut

Weights = HuggingFaceReader | ConvertedFiles
"""The weights of a model: in files, or in a checkpoint that becomes one as it is read."""


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


def float_dtype(files: Weights) -> torch.dtype:
    """Of the first tensor that has floating-point elements; fp32 if there is none."""
    dtypes = (files.entry(name).dtype for name in sorted(files.names))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def read_part(files: Weights, name: str, part: Part) -> Tensor:
    """A rank's part of the tensor called `name`."""
    out = part.empty()
    _read_into(out, files, name, part.whole_shape, part.cut, part.rank)
    return out


def read_experts(files: Weights, names: ExpertNames, part: Part) -> Tensor:
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
    files: Weights,
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
    for place, stored in files.pieces(name):
        piece, axes = (out, 0) if place is None else (out[place], 1)
        if cut is None:
            piece.copy_(stored[:] if piece.dim() else stored[...])
            continue
        dim, start = cut.dim - axes, 0
        before: tuple[slice, ...] = (slice(None),) * dim
        for first, length in contiguous_runs(cut.indices[rank]):
            read = stored[(*before, slice(first, first + length))]
            piece.narrow(dim, start, length).copy_(read)
            start += length


@dataclass(frozen=True)
class FileNames:
    """What files call the weights of a model, where that is not what the model calls them.

    Args:
        renamed: (in the model, in files) of parts of names.
        matrices: last part of a stacked parameter's name → what files call its matrices, which they keep for
            each expert: `MODULE.experts.E.NAME.weight`.
    """

    renamed: tuple[tuple[str, str], ...] = ()
    matrices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def plain(self, name: str) -> str:
        """The name in files of a weight that files hold as the model does."""
        for own, stored in self.renamed:
            name = name.replace(own, stored, 1)
        return name

    def stacked(self, name: str) -> ExpertNames | None:
        """The names in files of a stacked parameter; None for any other."""
        path, _, last = self.plain(name).rpartition(".")
        if not path.endswith(".experts") or last not in self.matrices:
            return None
        return ExpertNames(tuple(f"{path}.{{}}.{one}.weight" for one in self.matrices[last]))


@dataclass(frozen=True)
class ExpertNames:
    """The names in files of one stacked parameter's matrices, with `{}` for the number of the expert."""

    templates: tuple[str, ...]

    def of(self, expert: int) -> list[str]:
        return [template.format(expert) for template in self.templates]


def file_names(model_type: str) -> FileNames:
    """What files call the weights of models of a type, from the library's own table.

    That table says how weights are converted while they are loaded. What it has of another form, such as
    prefixes of models that see, is not read.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    renamed, matrices = [], {}
    for row in get_checkpoint_conversion_mapping(model_type) or ():
        # The patterns as they were written: newer releases add to them.
        written = getattr(row, "_original_source_patterns", row.source_patterns)
        target = getattr(row, "_original_target_patterns", row.target_patterns)[0]
        operations = [type(one).__name__ for one in getattr(row, "operations", ())]
        if operations[:1] == ["MergeModulelist"] and ".experts." in target:
            matrices[target.rpartition(".")[2]] = tuple(one.split(".")[-2] for one in written)
        elif not operations and len(written) == 1:
            pair = target, re.sub(r"\\(.)", r"\1", written[0])
            if not any(set(text) & set("^$*+?()[]|\\") for text in pair):
                renamed.append(pair)
    return FileNames(tuple(renamed), matrices)


def stored_weights(model: Any) -> list[tuple[str, Tensor]]:
    """The parameters and the buffers that files hold, tied ones once."""
    found: list[tuple[str, Tensor]] = list(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((f"{path}.{name}" if path else name, buffer))
    return found


def missing_names(missing: list[str], directory: Path) -> HelixError:
    """The error of weights that a model needs and files do not have."""
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    return HelixError(
        f"{directory} lacks {listed(missing[:4])}{more}, which its config.json asks for. Take config.json and "
        "weights of one model."
    )
