"""The documents of input files: plain text or JSON lines, compressed or not, told by what a file holds."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from helix_megatron.errors import HelixError

BATCH_BYTES = 1 << 20  # large enough that a worker's answer costs little beside its work
INPUT_FORMATS = ("auto", "text", "jsonl")
DOCUMENT_RULES = ("file", "blank-line")
BOM = codecs.BOM_UTF8
HEAD_BYTES = 512
# The library that reads what begins with these bytes.
COMPRESSED = {
    rb"\x1f\x8b\x08": "gzip",
    rb"BZh[1-9]1AY&SY": "bz2",
    rb"\xfd7zXZ\0": "lzma",
    rb"\x28\xb5\x2f\xfd": "zstandard",
}
# What begins with these bytes is not text, whatever its name says.
NOT_TEXT = {
    rb"\xff\xfe|\xfe\xff": "text in UTF-16 or UTF-32; convert it with iconv -t UTF-8",
    rb"PK\x03\x04": "a zip archive; give the files in it",
    rb"(?s:.{257})ustar": "a tar archive; give the files in it",
    rb"PAR1\x15": "a Parquet file; write its text as JSON lines",
    rb"ARROW1\0\0": "an Arrow file; write its text as JSON lines",
}


class Document(NamedTuple):
    """One document as it was read: a line of JSON or raw text, and where it begins."""

    path: str
    line: int
    content: bytes
    is_json: bool


class Input(NamedTuple):
    """A file, and whether it holds JSON lines."""

    path: str
    is_json: bool


def recognise(paths: Sequence[str], input_format: str) -> list[Input]:
    """What each file holds."""
    return [Input(path, _is_json_lines(path, input_format)) for path in paths]


def describe(inputs: Sequence[Input]) -> str:
    """A line that tells people how the files are read."""
    parts = []
    for is_json, kind in ((True, "JSON lines"), (False, "plain text")):
        names = [path for path, found in inputs if found == is_json]
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        if names:
            parts.append(f"{', '.join(names[:3])}{more} as {kind}")
    return f"reading {'; '.join(parts)}"


def _is_json_lines(path: str, input_format: str) -> bool:
    """Whether a file is named as JSON lines, or its first line with text is a JSON object."""
    with open_input(path) as stream:
        name = re.sub(r"\.(gz|bz2|xz|zst)$", "", path.lower())
        if input_format != "auto" or name.endswith((".jsonl", ".ndjson", ".json")):
            return input_format != "text"
        first = b"\n"
        while first.isspace():
            first = stream.readline(HEAD_BYTES)
        if not first.lstrip().startswith((b"{", b"[")):
            return False  # it may be one line of many gigabytes
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(first + (b"" if first.endswith(b"\n") else stream.readline()))
            # A list of objects is no line of JSON lines, and no text that anybody wants: the reader says so.
            return bool(value) and isinstance(value[0] if isinstance(value, list) else value, dict)
        return False


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed, behind the byte order mark if it has one.

    Raises:
        HelixError: it is not text, it is damaged, or the library that decompresses it is not installed.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise HelixError(
            f"{path} is a pipe or a device, and input is read more than once. Write it to a file first."
        )
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(path, "rb"))
        library = next((name for magic, name in COMPRESSED.items() if _begins(stream, magic)), None)
        damage: tuple[type[Exception], ...] = ()
        if library is not None:
            module = _decompressor(path, library)
            errors = (getattr(module, name, EOFError) for name in ("LZMAError", "ZstdError"))
            damage = (EOFError, zlib.error, OSError, *errors)
            raw = _Zstandard(module, stream) if library == "zstandard" else module.open(stream)
            stream = stack.enter_context(io.BufferedReader(raw))
        try:
            for magic, kind in NOT_TEXT.items():
                if _begins(stream, magic):
                    raise HelixError(f"{path} is {kind}. Valid: text in UTF-8, or JSON lines.")
            if _begins(stream, re.escape(BOM)):
                stream.read(len(BOM))
            yield stream
        except damage as error:
            raise HelixError(
                f"{path} cannot be decompressed: {error}. It is damaged or incomplete: copy it again."
            ) from error


def is_compressed(path: str) -> bool:
    with open(path, "rb") as stream:
        return any(_begins(stream, magic) for magic in COMPRESSED)


def _begins(stream: io.BufferedReader, magic: bytes) -> bool:
    return re.match(magic, stream.peek(HEAD_BYTES)) is not None


def _decompressor(path: str, library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise HelixError(
            f"{path} is compressed, and reading it needs the package {library}, which is not installed. Try "
            f"pip install {library}, or decompress the file."
        ) from error


class _Zstandard(io.RawIOBase):
    """The text of Zstandard frames. The package's own reader takes a part of a file for a whole one."""

    def __init__(self, module: Any, stream: BinaryIO) -> None:
        self._module, self._stream = module, stream
        self._frame: Any = None
        self._text = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            ended = self._frame is None or self._frame.eof
            data = self._frame.unused_data if self._frame and ended else b""
            data = data or self._stream.read(BATCH_BYTES // 8)
            if not data and not ended:
                raise EOFError("its last frame is not whole")
            if not data:
                return 0
            if ended:
                self._frame = self._module.ZstdDecompressor().decompressobj()
            self._text = self._frame.decompress(data)
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def read_documents(inputs: Sequence[Input], split_documents: str = "file") -> Iterator[Document]:
    """The documents of the files in order. Blank lines of JSON files are passed over."""
    for path, is_json in inputs:
        with open_input(path) as stream:
            if is_json:
                for number, line in enumerate(stream, start=1):
                    if not line.isspace():
                        yield Document(path, number, line, is_json=True)
            elif split_documents == "file":
                yield Document(path, 1, stream.read(), is_json=False)
            else:
                yield from _paragraphs(path, stream)


def _paragraphs(path: str, lines: Iterable[bytes]) -> Iterator[Document]:
    paragraph: list[bytes] = []
    number = 0
    for number, line in enumerate(lines, start=1):
        if not line.isspace():
            paragraph.append(line)
        elif paragraph:
            yield Document(path, number - len(paragraph), b"".join(paragraph), is_json=False)
            paragraph = []
    if paragraph:
        yield Document(path, number - len(paragraph) + 1, b"".join(paragraph), is_json=False)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Consecutive documents, `BATCH_BYTES` or a little more at a time."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
