"""Hugging Face checkpoints, one tensor at a time: safetensors files and their index.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors' bytes
in the order of their offsets in it. The safetensors package writes a file from tensors that are all in memory;
here they are written one by one, to the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from helix_megatron.errors import HelixError, listed

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REOPEN_BYTES = (
    512 << 20
)  # a file is mapped anew after so much was read, so that its pages can be given back
HEADER_LIMIT = 100_000_000  # of the safetensors package

# In the order in which the safetensors package sorts tensors of a file, last first.
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# -------------------------------------------------------------------------- read


class HuggingFaceReader:
    """The tensors of a directory as `save_pretrained` writes it.

    Args:
        directory: with `model.safetensors`, or shards and their index.

    Raises:
        HelixError: there are no safetensors files, or one is damaged or missing, by name.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.headers: dict[str, bytes] = {}
        self._entries: dict[str, tuple[str, Entry]] = {}
        for file in self._files():
            self.headers[file] = read_header(self.directory / file)
            for entry in header_entries(self.headers[file], self.directory / file):
                if entry.name in self._entries:
                    raise HelixError(
                        f"tensor {entry.name} is in {self._entries[entry.name][0]} and in {file} of "
                        f"{self.directory}. Remove the file that does not belong to the model."
                    )
                self._entries[entry.name] = file, entry
        self._check_index()
        self._open: tuple[str, Any] | None = None
        self._served = 0

    @property
    def names(self) -> list[str]:
        """Of all tensors, file by file in the order of their bytes."""
        return list(self._entries)

    def entry(self, name: str) -> Entry:
        """dtype and shape of a tensor."""
        return self._entries[name][1]

    def file(self, name: str) -> str:
        """The file that a tensor is in."""
        return self._entries[name][0]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file: not to be written to.

        Raises:
            HelixError: the file is damaged.
        """
        file, entry = self._entries[name]
        try:
            if self._open is None or self._open[0] != file or self._served > REOPEN_BYTES:
                self._open = None
                handle = safetensors.safe_open(self.directory / file, framework="pt")
                self._open, self._served = (file, handle), 0
            self._served += entry.nbytes
            return self._open[1].get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise HelixError(_damaged(self.directory / file, str(error))) from error

    def _files(self) -> list[str]:
        index = self.directory / INDEX
        if index.is_file():
            files = sorted(set(self._index().values()))
        elif (self.directory / WEIGHTS).is_file():
            files = [WEIGHTS]
        else:
            files = sorted(path.name for path in self.directory.glob("*.safetensors"))
            if len(files) != 1:
                raise HelixError(self._nothing_text(files))
        for file in files:
            if not (self.directory / file).is_file():
                raise HelixError(
                    f"{self.directory / file} is missing: {INDEX} names it. Copy the model again."
                )
        return files

    def _nothing_text(self, files: Sequence[str]) -> str:
        if files:
            return f"{self.directory} has {len(files)} safetensors files and no {INDEX}. Copy the model again."
        pickled = sorted(
            path.name for end in ("bin", "pt", "pth") for path in self.directory.glob(f"*.{end}")
        )
        if pickled:
            return (
                f"{self.directory} holds pickled weights ({listed(pickled[:3])}), which can execute code when "
                "they are read. If you trust them, load them with transformers and save_pretrained() them to "
                "another directory: that writes safetensors."
            )
        return (
            f"{self.directory} has neither {WEIGHTS} nor {INDEX}: it is no Hugging Face checkpoint."
        )

    def _index(self) -> dict[str, str]:
        path = self.directory / INDEX
        content = read_json(path)
        table = content.get("weight_map")
        names = table.values() if isinstance(table, dict) else [None]
        plain = all(isinstance(n, str) and n and Path(n).name == n for n in names)
        if not plain:
            raise HelixError(_damaged(path, "weight_map is not a table of tensors and files"))
        assert isinstance(table, dict)
        return table

    def _check_index(self) -> None:
        if not (self.directory / INDEX).is_file():
            return
        for name, file in self._index().items():
            if name not in self._entries or self._entries[name][0] != file:
                raise HelixError(
                    f"{self.directory / INDEX} says that {name} is in {file}, and it is not. Copy the model "
                    "again."
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        HelixError: the file is missing or damaged, by name.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise HelixError(f"{path} is missing. Copy the model again.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise HelixError(_damaged(path, f"no valid JSON ({error})")) from error
    if not isinstance(content, dict):
        raise HelixError(_damaged(path, "no JSON object"))
    return content


def read_header(path: Path) -> bytes:
    """The JSON header of a safetensors file, as it stands there; the whole file's size is checked.

    Raises:
        HelixError: the file is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt"):
            pass  # the package checks header, offsets and size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return file.read(length)
    except (safetensors.SafetensorError, OSError) as error:
        raise HelixError(_damaged(path, str(error))) from error


def header_entries(header: bytes, path: Path) -> list[Entry]:
    """The tensors of a header in the order of their bytes.

    Raises:
        HelixError: a dtype that is not known.
    """
    table = json.loads(header)
    table.pop("__metadata__", None)
    ordered = sorted(table.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
    for name, facts in ordered:
        if facts["dtype"] not in DTYPES:
            raise HelixError(
                f"tensor {name} of {path} has dtype {facts['dtype']}. Known: {listed(DTYPES)}."
            )
    return [Entry(name, DTYPES[f["dtype"]], tuple(f["shape"])) for name, f in ordered]


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is damaged: {reason}. Copy the model again from where it came."


# ------------------------------------------------------------------------- write


def make_header(entries: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """The header that the safetensors package gives a file of these tensors, offsets in its order."""
    ordered = sorted(entries, key=lambda entry: (-RANKS[NAMES[entry.dtype]], entry.name))
    table: dict[str, Any] = {}
    if metadata is not None:
        table["__metadata__"] = dict(metadata)
    offset = 0
    for entry in ordered:
        table[entry.name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def make_index(files: Mapping[str, Sequence[Entry]]) -> bytes:
    """The index that transformers writes beside shards; file → tensors."""
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    parameters = sum(
        torch.Size(entry.shape).numel() for entries in files.values() for entry in entries
    )
    table = {entry.name: file for file, entries in files.items() for entry in entries}
    content = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(table.items())),
    }
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def shards(entries: Iterable[Entry], limit: int) -> dict[str, list[Entry]]:
    """File → tensors, in their order, each file of at most `limit` bytes or one tensor.

    Names are those of Hugging Face: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on.
    """
    files: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if files[-1] and size + entry.nbytes > limit:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.nbytes
    if len(files) == 1:
        return {WEIGHTS: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": part
        for number, part in enumerate(files, 1)
    }


class SafetensorsFile:
    """A safetensors file that is written tensor by tensor, in the order of its header's offsets.

    Args:
        path: of the file, replaced if it exists.
        header: JSON, of a length that is a multiple of 8; `make_header` gives one.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self._expected = header_entries(header, path)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._number = 0
        self.written = 0
        self._write(len(header).to_bytes(8, "little"))
        self._write(header)

    @property
    def missing(self) -> list[Entry]:
        """What is still to be added, in order."""
        return self._expected[self._number :]

    def add(self, tensor: Tensor) -> None:
        """Append the next tensor."""
        entry = self._expected[self._number]
        assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
        self._number += 1
        self._write(tensor_bytes(tensor))

    def close(self) -> None:
        """Put everything on the disk."""
        assert not self.missing, "tensors are missing"
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:
            count = self._file.write(view)
            assert count
            view = view[count:]
            self.written += count

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; a view of it where it is contiguous."""
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs and signs of zeros included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat = (tensor.contiguous().reshape(-1) for tensor in (one, other))
    return not one.numel() or torch.equal(*(tensor.view(torch.uint8) for tensor in flat))
