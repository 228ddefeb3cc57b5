"""Hugging Face checkpoints, one tensor at a time: safetensors files and their index.

A safetensors file is the length of a JSON header (8 bytes, little-endian), the header, and the tensors' bytes
in the order of their offsets in it. The safetensors package reads it; it writes a file only from tensors that
are all in memory, so files are written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import _TYPES
from torch import Tensor

from helix_megatron.checkpoint.foreign import (
    damaged,
    is_plain_name,
    parse_json,
    read_json,
    read_name,
)
from helix_megatron.checkpoint.manifest import FileEntry
from helix_megatron.checkpoint.output import OutputFile
from helix_megatron.errors import HelixError, listed
from helix_megatron.model.packing import Packing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REOPEN_BYTES = 512 << 20  # after so much a file is mapped anew, so that its pages can be given back
DTYPES: dict[str, torch.dtype] = {name: dtype for name, dtype in _TYPES.items() if dtype}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """The entry of a tensor, on whatever device."""
        return cls(name, tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# -------------------------------------------------------------------------- read


class HuggingFaceReader:
    """The tensors of a directory as `save_pretrained` writes it.

    Args:
        directory: with `model.safetensors`, or shards and their index.

    Attributes:
        files: their tensors, by name.
        sidecars: the folder of configuration and tokenizer.
        packing: how some of them are packed; None for plain files. See `packed.open_weights`.

    Raises:
        HelixError: there are no safetensors files, or one is damaged or missing, by name.
    """

    packing: Packing | None = None

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.files: dict[str, list[Entry]] = {}
        self._entries: dict[str, tuple[str, Entry]] = {}
        index = self.directory / INDEX
        table = weight_map(read_json(index), index) if index.is_file() else {}
        for file in self._file_names(table):
            self.files[file] = self._entries_of(file)
            for entry in self.files[file]:
                if entry.name in self._entries:
                    raise HelixError(
                        f"tensor {entry.name} is in {self._entries[entry.name][0]} and in {file} of "
                        f"{self.directory}. Remove the file that does not belong to the model."
                    )
                self._entries[entry.name] = file, entry
        for name, file in table.items():
            if name not in self._entries or self._entries[name][0] != file:
                raise HelixError(
                    f"{index} says that {name} is in {file}, and it is not. Copy the model again."
                )
        self.sidecars = self.directory
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
        return self._entries[name][0]

    def open(self, file: str) -> Any:
        """A file's own mapping, as the safetensors package has it."""
        try:
            return safetensors.safe_open(self.directory / file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise HelixError(damaged(self.directory / file, str(error))) from error

    def read(self, name: str, place: int | None = None) -> Tensor:
        """A tensor, or its part at one place of the first axis, mapped from its file: not to be written to."""
        file, entry = self._entries[name]
        if self._open is None or self._open[0] != file or self._served > REOPEN_BYTES:
            self._open = None
            self._open, self._served = (file, self.open(file)), 0
        self._served += entry.nbytes // (1 if place is None else entry.shape[0])
        if place is not None:
            return self._open[1].get_slice(name)[place]
        return self._open[1].get_tensor(name)

    @contextmanager
    def part(self, name: str) -> Iterator[Any]:
        """What gives parts of a tensor by slices. The mapping of its file lasts as long as the block."""
        with self.open(self.file(name)) as opened:
            yield opened.get_slice(name)

    def pieces(self, name: str) -> Iterator[tuple[int | None, Any]]:
        """What a tensor is read from, in turn: a place on its first axis, and what gives parts of it by slices.

        The place is None where that is the whole tensor, as it is in files.
        """
        with self.part(name) as stored:
            yield None, stored

    def finish(self) -> None:
        """As `Source.finish`: the package has checked the files that were opened."""

    def _entries_of(self, file: str) -> list[Entry]:
        """The tensors of a file; the package checks header, offsets and size, but takes names twice."""
        found, path = [], self.directory / file
        with self.open(file) as opened:
            with open(path, "rb") as stream:
                header = stream.read(int.from_bytes(stream.read(8), "little"))
            parse_json(header, path, unique=True)
            for name in opened.offset_keys():
                facts = opened.get_slice(name)
                if facts.get_dtype() not in DTYPES:
                    raise HelixError(
                        f"tensor {name} of {self.directory / file} has dtype {facts.get_dtype()}. Known: "
                        f"{listed(DTYPES)}."
                    )
                found.append(Entry(name, DTYPES[facts.get_dtype()], tuple(facts.get_shape())))
        return found

    def _file_names(self, table: Mapping[str, str]) -> list[str]:
        if table or (self.directory / INDEX).is_file():
            files = sorted(set(table.values()))
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


def weight_map(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Tensor → file, as an index has it.

    Raises:
        HelixError: it has no such table, or one that leads to other files than safetensors beside it.
    """
    table = content.get("weight_map")
    names = table.values() if isinstance(table, dict) else [None]
    if not all(is_plain_name(name) and name.endswith(".safetensors") for name in names):
        raise HelixError(damaged(path, "weight_map is not a table of tensors and files"))
    assert isinstance(table, dict)
    return table


def snapshot_of(directory: Path) -> Path:
    """The model in a folder of the Hub's cache (`models--OWNER--NAME`): the snapshot that `refs/main` names.

    Any other directory is given back as it is.

    Raises:
        HelixError: the folder has snapshots, and `refs/main` names none of them.
    """
    snapshots, main = directory / "snapshots", directory / "refs" / "main"
    if (directory / "config.json").exists() or not (snapshots.is_dir() and main.parent.is_dir()):
        return directory
    name = read_name(main, "Download the model again.")
    if is_plain_name(name) and (snapshots / name).is_dir():
        return snapshots / name
    have = sorted(path.name for path in snapshots.iterdir())
    raise HelixError(
        f"{main} names {name[:40]!r}, which is no directory in {snapshots}. Valid: {listed(have)}. Download "
        "the model again, or give one of these directories."
    )


# ------------------------------------------------------------------------- write


class SafetensorsFile(OutputFile):
    """A safetensors file that is written tensor by tensor.

    Args:
        path: of the file, replaced if it exists.
        entries: what it will hold. Tensors of larger elements come first, so that all are aligned.
    """

    def __init__(self, path: Path, entries: Iterable[Entry]) -> None:
        self.missing = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.missing:
            table[entry.name] = {
                "dtype": NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.nbytes],
            }
            offset += entry.nbytes
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        super().__init__(path)
        self.write(len(header).to_bytes(8, "little"))
        self.write(header)

    def add(self, tensor: Tensor) -> None:
        """Append the tensor that is the first of `missing`."""
        entry = self.missing.pop(0)
        assert Entry.of(entry.name, tensor) == entry, entry.name
        self.write(tensor_bytes(tensor))


def write_safetensors(
    path: Path, entries: Iterable[Entry], tensor_of: Callable[[str], Tensor]
) -> FileEntry:
    """Write a whole file; `tensor_of` gives the tensor of a name, one at a time."""
    with SafetensorsFile(path, entries) as file:
        while file.missing:
            file.add(tensor_of(file.missing[0].name))
        return file.finish()


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
