"""Weights that files keep in fewer bits, unpacked as they are read: fp8 in blocks, and MXFP4.

fp8 (DeepSeek-V3, MiniMax-M2, the FP8 files of Qwen3): `X` is e4m3 […, R, C], and `X_scale_inv` has a factor for
each block of its rows and columns […, ⌈R/128⌉, ⌈C/128⌉], so the last blocks may be smaller (arXiv 2412.19437,
section 3.3). Where a whole matrix has one factor, `X_scale_inv` is a scalar.

MXFP4 (gpt-oss): `X_blocks` [E, R, G, 16] has two e2m1 in a byte, the lower four bits first, and `X_scales`
[E, R, G] the exponent, less 127, of each 32 of them (OCP Microscaling Formats 1.0); `X` is [E, 32·G, R].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helix_megatron.checkpoint.foreign import AGAIN, read_json
from helix_megatron.checkpoint.huggingface_io import Entry, HuggingFaceReader
from helix_megatron.errors import HelixError, listed
from helix_megatron.model.packing import KEY, Packing, packing_of

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
GROUP = 32  # elements of MXFP4 that share an exponent
NO_NUMBER = 255  # the exponent of NaN
ENDS = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}  # of values and scales
UNUSED = ".activation_scale"  # by which engines that compute in fp8 divide


def open_weights(directory: Path | str, dtype: torch.dtype | None = None) -> HuggingFaceReader:
    """The tensors of a directory, the packed ones as plain ones.

    Args:
        directory: with safetensors; its config.json, if it has one, says how they are packed.
        dtype: of the weights that are unpacked; bfloat16 when None.

    Raises:
        HelixError: damaged files; weights packed in another way; scales that are missing, do not fit their
            weight, or are not finite, by the names of file and tensor.
    """
    path = Path(directory) / "config.json"
    packing = packing_of(read_json(path)) if path.is_file() else None
    if packing is not None:
        return PackedReader(directory, packing, dtype or torch.bfloat16)
    files = HuggingFaceReader(directory)
    for name in files.names:
        entry, file = files.entry(name), files.directory / files.file(name)
        if _is_fp8(entry):
            raise HelixError(
                f"tensor {name} of {file} is {entry.dtype}, and config.json has no {KEY} that says how it was "
                "scaled. Take config.json and weights of one model."
            )
    return files


def unpack_fp8(
    values: Tensor,
    scales: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    start: tuple[int, int] = (0, 0),
) -> Tensor:
    """Part of a matrix, times its scales in fp32; a row of blocks at a time.

    Args:
        values: e4m3 [..., R, C].
        scales: of the whole matrix, [..., rows of blocks, columns of blocks].
        block: rows and columns of a block.
        dtype: of the result.
        start: the row and the column of the whole matrix at which the part begins.
    """
    out = torch.empty(values.shape, dtype=dtype)
    (rows, columns), (height, width) = values.shape[-2:], block
    of_column = (torch.arange(columns) + start[1]) // width
    for number in range(start[0] // height, -(-(start[0] + rows) // height)):
        first = max(number * height - start[0], 0)
        last = min((number + 1) * height - start[0], rows)
        factors = scales[..., number, None, :].float()[..., of_column]
        out[..., first:last, :] = values[..., first:last, :].float() * factors
    return out


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., R, G, 16] bytes and [..., R, G] exponents → [..., 32·G, R]; one expert at a time."""
    *lead, rows, groups, size = blocks.shape
    out = torch.empty(*lead, groups * GROUP, rows, dtype=dtype)
    table = torch.tensor(E2M1)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)  # of a byte
    matrices = out.view(-1, groups * GROUP, rows)
    packed = blocks.reshape(-1, rows, groups, size), scales.reshape(-1, rows, groups, 1, 1)
    for matrix, own, exponents in zip(matrices, *packed, strict=True):
        factors = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 127)
        values = pairs.index_select(0, own.int().flatten()).view(rows, groups, size, 2)
        matrix.copy_((values * factors).flatten(1).to(dtype).t())
    return out


@dataclass(frozen=True)
class Packed:
    """One packed tensor: the names of what files hold of it, and its shape."""

    values: str
    scales: str
    shape: tuple[int, ...]


class PackedReader(HuggingFaceReader):
    """Files whose packed tensors are shown, and read, as plain ones. See `open_weights`.

    Args:
        packing: how they are packed.
        dtype: of what is unpacked.
    """

    packing: Packing

    def __init__(self, directory: Path | str, packing: Packing, dtype: torch.dtype) -> None:
        super().__init__(directory)
        self.packing, self._dtype = packing, dtype
        self._packed: dict[str, Packed] = {}
        values_end, scales_end = ENDS[packing.method]
        scales = {name for name in self._entries if name.endswith(scales_end)}
        for file, entries in self.files.items():
            shown = []
            for entry in entries:
                if entry.name in scales or entry.name.endswith(UNUSED):
                    continue
                if not (entry.name.endswith(values_end) and _is_packed(entry, packing)):
                    shown.append(entry)
                    continue
                name = entry.name.removesuffix(values_end)
                self._packed[name] = self._packed_entry(entry, name + scales_end, scales)
                shown.append(Entry(name, dtype, self._packed[name].shape))
            self.files[file] = shown
        if unused := sorted(scales - {packed.scales for packed in self._packed.values()}):
            raise self._error(unused[0], f"has scales of a weight that is not packed in {packing}")
        self._shown = {entry.name: entry for entries in self.files.values() for entry in entries}

    @property
    def names(self) -> list[str]:
        return list(self._shown)

    def entry(self, name: str) -> Entry:
        return self._shown[name]

    def file(self, name: str) -> str:
        packed = self._packed.get(name)
        return super().file(name if packed is None else packed.values)

    def read(self, name: str, place: int | None = None) -> Tensor:
        packed = self._packed.get(name)
        if packed is None:
            return super().read(name, place)
        whole = packed.shape if place is None else packed.shape[1:]
        where = [slice(0, size) for size in whole]
        stored = super().read(packed.values, place)
        return self._part(stored, self._scales(packed, place), where, packed)

    @contextmanager
    def part(self, name: str) -> Iterator[Any]:
        packed = self._packed.get(name)
        with super().part(name if packed is None else packed.values) as stored:
            if packed is None:
                yield stored
                return
            yield _Parts(self, stored, packed, self._scales(packed))

    def _packed_entry(self, entry: Entry, scales: str, known: set[str]) -> Packed:
        """Check what stands in the headers; nothing of it is read yet."""
        block, shape, floating = self.packing.block, entry.shape, self.packing.method == "fp8"
        if floating:
            problem = f"is {entry.dtype} of shape {list(shape)}, and only"
            if entry.dtype != torch.float8_e4m3fn or len(shape) < 2:
                raise self._error(entry.name, f"{problem} matrices of e4m3 can be unpacked")
            if block is None and len(shape) > 2:
                raise self._error(entry.name, f"{problem} single matrices can have one scale")
            whole = shape
            blocks = (-(-size // by) for size, by in zip(shape[-2:], block or (1, 1), strict=True))
            expected = [(*shape[:-2], *blocks)] if block else [(), (1,), (1, 1)]
        else:
            if len(shape) < 3 or shape[-1] != GROUP // 2:
                problem = f"has shape {list(shape)}, and blocks of MXFP4 have {GROUP // 2} bytes"
                raise self._error(entry.name, problem)
            whole = (*shape[:-3], shape[-2] * GROUP, shape[-3])
            expected = [shape[:-1]]
        if scales not in known:
            raise self._error(
                entry.name, f"is packed in {self.packing}, and its scales {scales} are missing"
            )
        found = super().entry(scales)
        known_dtype = found.dtype.is_floating_point if floating else found.dtype == torch.uint8
        if found.shape not in expected or not known_dtype:
            kind = "floating-point numbers" if floating else "bytes"
            problem = f"is {found.dtype} of shape {list(found.shape)}, and {entry.name} needs {kind} of shape"
            raise self._error(scales, f"{problem} {listed(list(one) for one in expected)}")
        return Packed(entry.name, scales, whole)

    def _part(self, stored: Any, scales: Tensor, where: Sequence[slice], packed: Packed) -> Tensor:
        """The part `where` of a tensor, whose values `stored` gives by slices."""
        *lead, rows, columns = where
        own = scales[tuple(lead)]
        if self.packing.method == "fp8":
            block = self.packing.block or (packed.shape[-2], packed.shape[-1])
            values = stored[tuple(where)]
            return unpack_fp8(values, own, block, self._dtype, (rows.start, columns.start))
        first, last = rows.start // GROUP, -(-rows.stop // GROUP)
        groups = columns, slice(first, last)
        out = unpack_mxfp4(stored[(*lead, *groups)], own[(..., *groups)], self._dtype)
        return out.narrow(-2, rows.start - first * GROUP, rows.stop - rows.start)

    def _scales(self, packed: Packed, place: int | None = None) -> Tensor:
        scales = super().read(packed.scales, place)
        if self.packing.method == "fp8":
            finite = bool(scales.float().isfinite().all())
        else:
            finite = not bool((scales == NO_NUMBER).any())
        if not finite:
            raise self._error(packed.scales, "has scales that are no finite numbers")
        return scales if scales.numel() > 1 else scales.reshape((1,) * len(packed.shape))

    def _error(self, name: str, problem: str) -> HelixError:
        path = self.directory / super().file(name)
        return HelixError(f"tensor {name} of {path} {problem}. {AGAIN}")


@dataclass(frozen=True)
class _Parts:
    """Parts of a packed tensor by slices, as safetensors gives those of a plain one."""

    reader: PackedReader
    stored: Any
    packed: Packed
    scales: Tensor

    def __getitem__(self, index: slice | tuple[slice, ...]) -> Tensor:
        given = index if isinstance(index, tuple) else (index,)
        padded = (*given, *[slice(None)] * (len(self.packed.shape) - len(given)))
        where = [slice(*one.indices(n)) for one, n in zip(padded, self.packed.shape, strict=True)]
        return self.reader._part(self.stored, self.scales, where, self.packed)


def _is_fp8(entry: Entry) -> bool:
    return str(entry.dtype).startswith("torch.float8")


def _is_packed(entry: Entry, packing: Packing) -> bool:
    return _is_fp8(entry) if packing.method == "fp8" else entry.dtype == torch.uint8
