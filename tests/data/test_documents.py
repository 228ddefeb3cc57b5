"""What a file of text holds is told by its bytes, not by its name; and none of it is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest

from helix_megatron.data.documents import read_documents, recognise
from helix_megatron.errors import HelixError

LINES = b'\n{"text": "a"}\n\n{"text": "b"}\n'
FRAME = b"\x28\xb5\x2f\xfd"  # begins a frame of Zstandard


def read(path: Path, content: bytes, input_format: str = "auto") -> list[bytes]:
    """The documents of a file with this content."""
    path.write_bytes(content)
    inputs = recognise([str(path)], input_format)
    return [document.content for document in read_documents(inputs)]


@pytest.mark.parametrize("name", ["x.ndjson", "x.JSONL", "part-00000", "a.txt", "a.json.gz"])
def test_json_lines_of_any_name(tmp_path, name):
    """Braces and keys must not become tokens unless they are asked for."""
    documents = [b'{"text": "a"}\n', b'{"text": "b"}\n']
    assert read(tmp_path / name, LINES) == documents
    assert read(tmp_path / name, LINES, "jsonl") == documents
    assert read(tmp_path / name, LINES, "text") == [LINES]


@pytest.mark.parametrize("text", [b"{a}", b"{", b"[1] a note", b"[1]", b"{}", b"", b"\n \n"])
def test_text_that_begins_like_json(tmp_path, text):
    """It is text, but where the name promises JSON lines: there it is for the reader to refuse."""
    assert read(tmp_path / "x", text) == [text]
    assert read(tmp_path / "x.jsonl", text) == ([text] if text.strip() else [])


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_read(tmp_path, pack):
    """Several parts one after the other too, and never a part of one for the whole."""
    path = tmp_path / "packed"
    lines = LINES * 2000
    whole = pack(lines[:9000]) + pack(lines[9000:])
    assert read(path, whole, "text") == [lines]
    for damaged in (whole[:-20], whole[:40] + b"?" * 40 + whole[80:]):
        with pytest.raises(HelixError, match=r"packed cannot be decompressed: .* copy it again"):
            read(path, damaged, "text")


def test_zstandard_is_read_by_a_package_of_its_own(tmp_path, monkeypatch):
    """Python's library has it from 3.14 on; who has not the package is told its name."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(HelixError, match="Try pip install zstandard, or decompress the file"):
        read(tmp_path / "x.zst", FRAME)

    class Frame:
        """Of the package: text up to the end of a line is a whole frame."""

        eof, unused_data = False, b""

        def decompress(self, data: bytes) -> bytes:
            text, frame, rest = data[4:].partition(FRAME)
            self.eof, self.unused_data = text.endswith(b"\n"), frame + rest
            return text

    library = types.SimpleNamespace(decompressobj=Frame)
    stand_in = types.SimpleNamespace(ZstdDecompressor=lambda: library, ZstdError=RuntimeError)
    monkeypatch.setitem(sys.modules, "zstandard", stand_in)
    assert read(tmp_path / "x.zst", FRAME + b"a\n" + FRAME + b"b\n") == [b"a\nb\n"]
    with pytest.raises(HelixError, match="cannot be decompressed: its last frame is not whole"):
        read(tmp_path / "x.zst", FRAME + b"a\n" + FRAME + b"b")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(tmp_path, pack):
    """It would be three tokens of a document, or hide that the file holds JSON lines."""
    assert read(tmp_path / "x", pack(b"\xef\xbb\xbftext")) == [b"text"]
    assert len(read(tmp_path / "x", pack(b"\xef\xbb\xbf" + LINES))) == 2


def test_what_is_no_text_is_refused(tmp_path):
    """Its bytes would be tokens."""
    tar, archive = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:gz") as file:
        file.add(__file__)
    with zipfile.ZipFile(archive, "w") as file:
        file.write(__file__)
    for content, kind in (
        (tar.getvalue(), "a tar archive; give the files in it"),
        (archive.getvalue(), "a zip archive; give the files in it"),
        ("text".encode("utf-16"), "text in UTF-16 or UTF-32; convert it with iconv -t UTF-8"),
        (b"PAR1\x15\x04", "a Parquet file; write its text as JSON lines"),
        (b"ARROW1\0\0", "an Arrow file; write its text as JSON lines"),
    ):
        with pytest.raises(HelixError, match=f"x is {kind}. Valid: text in UTF-8, or JSON lines"):
            read(tmp_path / "x", content)


def test_a_pipe_is_no_input(tmp_path):
    """It is read twice, and its first bytes would be lost; without a writer it would wait for ever."""
    os.mkfifo(tmp_path / "x")
    with pytest.raises(HelixError, match="is a pipe or a device, and input is read more than once"):
        recognise([str(tmp_path / "x")], "auto")
