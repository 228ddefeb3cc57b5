"""Megatron's `.bin/.idx` files: checks before use, and writing.

A `.idx` file is, little-endian (`_IndexWriter` of megatron-core):

    magic [9 bytes] | version u64 | token type u8 | sequences n u64 | document ends c u64
    lengths int32 [n] | byte offsets int64 [n] | document ends int64 [c] | modes int8 [n], multimodal only
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helix_megatron.errors import HelixError, listed

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
MAX_DOCUMENT_TOKENS = 2**31 - 1  # lengths are int32
REMAKE = "Make it again with scripts/preprocess_data.py."


@dataclass(frozen=True)
class IndexSummary:
    """What the header and the lengths of an index say.

    `lengths` [sequences] is int32, mapped from the file; `digest` names its content.
    """

    prefix: str
    token_type: np.dtype
    documents: int
    tokens: int
    lengths: np.ndarray
    digest: str


def check_indexed_dataset(prefix: str, vocab_size: int | None = None) -> IndexSummary:
    """Check `PREFIX.idx` and `PREFIX.bin` by the header, the lengths and the file sizes.

    Of the tokens only the first non-empty sequence is read, and only if `vocab_size` is given.

    Raises:
        HelixError: a file is missing, is not a Megatron index, is truncated or does not fit the other;
            or the first sequence holds ids outside [0, `vocab_size`).
    """
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(path):
            raise HelixError(_missing(prefix, path))
    idx, size = f"{prefix}.idx", os.path.getsize(f"{prefix}.idx")
    token_type, sequences, ends, expected = _read_header(idx, size)
    if sequences == 0:
        raise HelixError(f"{idx} holds no documents: its .bin has nothing to train on. {REMAKE}")
    lengths = np.memmap(idx, np.dtype("<i4"), "r", offset=HEADER.size, shape=(sequences,))
    tokens = int(lengths.sum(dtype=np.int64))
    with open(idx, "rb") as stream:
        stream.seek(expected - 8)
        (last_end,) = struct.unpack("<q", stream.read(8))
        stream.seek(HEADER.size + 12 * sequences - 8)
        (last_offset,) = struct.unpack("<q", stream.read(8))
    if lengths.min() < 0 or last_end != sequences:
        raise _damaged(
            f"{idx} is corrupt: its shortest sequence has {lengths.min()} tokens, and its last document ends "
            f"at sequence {last_end} of {sequences}."
        )
    if tokens == 0:
        raise HelixError(
            f"{idx} holds no tokens: all of its {sequences} sequences are empty. {REMAKE}"
        )
    _check_bin(prefix, token_type, lengths, tokens, last_offset)
    if vocab_size is not None:
        _check_vocabulary(prefix, token_type, lengths, vocab_size)
    digest = hashlib.blake2b(lengths.data, digest_size=16).hexdigest()
    return IndexSummary(prefix, token_type, ends - 1, tokens, lengths, digest)


def _missing(prefix: str, path: str) -> str:
    problem = (
        f"no dataset at the prefix {prefix}: {path} does not exist (looked from {os.getcwd()})."
    )
    root, suffix = os.path.splitext(prefix)
    if suffix in (".bin", ".idx"):
        return f"{problem} --data-path takes the prefix without the suffix: {root}."
    found = sorted(glob.glob(f"{glob.escape(prefix)}*.idx"))[:5]
    found = (
        found or sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(prefix)), "*.idx")))[:5]
    )
    if f"{prefix}.idx" in found:
        return f"{problem} The index is there without its data: copy the .bin too, or remake both."
    if found:
        return f"{problem} Prefixes there: {listed(name[:-4] for name in found)}."
    return f"{problem} Make one: scripts/preprocess_data.py --input FILE --output-prefix PREFIX."


def _read_header(idx: str, size: int) -> tuple[np.dtype, int, int, int]:
    """(token type, sequences, document ends, bytes that the file must have)."""
    with open(idx, "rb") as stream:
        header = stream.read(HEADER.size)
    if not header.startswith(MAGIC) and header != MAGIC[: len(header)]:
        raise HelixError(
            f"{idx} is not a Megatron index: it begins with {header[:9]!r}, not {MAGIC!r}. --data-path "
            "takes what scripts/preprocess_data.py (or Megatron's) made; for plain text use --text."
        )
    if len(header) < HEADER.size:
        raise _damaged(
            f"{idx} is truncated: {size} bytes, and the header alone takes {HEADER.size}."
        )
    _, version, code, sequences, ends = HEADER.unpack(header)
    if version != 1:
        raise HelixError(f"{idx} has index version {version}. Valid: 1. {REMAKE}")
    if code not in TOKEN_TYPES:
        valid = listed(f"{code} ({name})" for code, name in TOKEN_TYPES.items())
        raise HelixError(f"{idx} has token type {code}. Valid: {valid}. {REMAKE}")
    expected = HEADER.size + 12 * sequences + 8 * ends
    if ends < 1 or size not in (expected, expected + sequences):
        raise _damaged(
            f"{idx} is {'truncated' if size < expected else 'corrupt'}: {size} bytes, but its header announces "
            f"{sequences} sequences and {ends} document ends, which take {expected}."
        )
    return np.dtype(TOKEN_TYPES[code]), sequences, ends, expected


def _check_bin(
    prefix: str, token_type: np.dtype, lengths: np.ndarray, tokens: int, last_offset: int
) -> None:
    size, expected = os.path.getsize(f"{prefix}.bin"), tokens * token_type.itemsize
    if size != expected:
        raise HelixError(
            f"{prefix}.bin is {'shorter' if size < expected else 'longer'} than its index says: {size} "
            f"bytes, but {tokens} tokens of {token_type.name} take {expected}. The two files do not "
            f"belong together or a copy is incomplete: copy both again. {REMAKE}"
        )
    if last_offset != expected - int(lengths[-1]) * token_type.itemsize:
        raise _damaged(
            f"{prefix}.idx is corrupt: its last sequence of {lengths[-1]} tokens begins at byte "
            f"{last_offset} of {expected}."
        )


def _damaged(problem: str) -> HelixError:
    return HelixError(f"{problem} Copy it again from its source. {REMAKE}")


def _check_vocabulary(
    prefix: str, token_type: np.dtype, lengths: np.ndarray, vocab_size: int
) -> None:
    # Empty sequences take no bytes, so the first tokens of the file are those of the first that has any.
    length = int(lengths[np.argmax(lengths > 0)])
    ids = np.fromfile(f"{prefix}.bin", dtype=token_type.newbyteorder("<"), count=length)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise HelixError(
            f"the first document of {prefix}.bin has token ids from {lowest} to {highest}, but the "
            f"tokenizer has {vocab_size} tokens. Valid ids: 0 to {vocab_size - 1}. Give the tokenizer "
            "that made the dataset: --tokenizer-model, --tokenizer-type."
        )


@contextlib.contextmanager
def write_indexed_datasets(
    prefixes: Sequence[str], token_type: Any, *, overwrite: bool = False
) -> Iterator[list[Any]]:
    """`IndexedDatasetBuilder`s, one per prefix, whose files appear together when the block ends.

    They are written in a temporary directory beside their destination; a block that raises leaves
    nothing behind. `token_type` is a numpy integer type.

    Raises:
        HelixError: the directory cannot be written, or output exists and `overwrite` is not set.
    """
    directory = os.path.dirname(prefixes[0]) or "."
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK):
        problem = "is not writable" if os.path.isdir(directory) else "does not exist"
        raise HelixError(
            f"the directory {directory} of --output-prefix {problem}. Make it with mkdir -p "
            f"{directory}, or choose another."
        )
    paths = [f"{prefix}.{suffix}" for suffix in ("bin", "idx") for prefix in prefixes]
    existing = [path for path in paths if os.path.exists(path)]
    if existing and not overwrite:
        raise HelixError(
            f"the output {listed(existing)} exists. Choose another --output-prefix, or replace it with "
            "--overwrite."
        )
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as partial:
        names = [os.path.join(partial, os.path.basename(prefix)) for prefix in prefixes]
        builders = [IndexedDatasetBuilder(f"{name}.bin", dtype=token_type) for name in names]
        try:
            yield builders
            for name, builder in zip(names, builders, strict=True):
                builder.finalize(f"{name}.idx")
        finally:
            for builder in builders:
                builder.data_file.close()
        for prefix in prefixes:
            # Without this, replaced data would for a moment stand beside the index of the old.
            with contextlib.suppress(FileNotFoundError):
                os.remove(f"{prefix}.idx")
        for path in paths:  # all data before any index: an index is a promise
            os.replace(os.path.join(partial, os.path.basename(path)), path)


def add_documents(builder: Any, tokens: np.ndarray, lengths: Sequence[int]) -> None:
    """Add documents of these lengths, whose token ids stand one after the other in `tokens`.

    Raises:
        HelixError: a document is longer than the format can say.
    """
    begin = 0
    for length in lengths:
        if length > MAX_DOCUMENT_TOKENS:
            raise HelixError(
                f"a document has {length} tokens; the format's limit is {MAX_DOCUMENT_TOKENS}. Try "
                "--split-documents blank-line, or split the input."
            )
        builder.add_document(tokens[begin : begin + length], [length])
        begin += length
