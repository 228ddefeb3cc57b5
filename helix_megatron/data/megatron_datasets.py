"""Megatron's `.bin/.idx` datasets: checks before use, writing, and train/valid/test.

Reading, shuffling and blending are megatron-core's (`IndexedDataset`, `GPTDataset`,
`BlendedMegatronDatasetBuilder`). This module adds the checks that turn a wrong file or setting into a
sentence; megatron-core asserts, or fails in the middle of training.

A `.idx` file is, little-endian (`_IndexWriter` of megatron-core):

    magic [9 bytes] | version u64 | token type u8 | sequences n u64 | document ends c u64
    lengths int32 [n] | byte offsets int64 [n] | document ends int64 [c] | modes int8 [n], multimodal only
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from helix_megatron.data.text import SPLITS, Tokenizer, check_order, parse_split, split_bounds
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
        raise HelixError(
            f"{idx} is corrupt: its shortest sequence has {lengths.min()} tokens, and its last document "
            f"ends at sequence {last_end} of {sequences}. Copy it again from its source. {REMAKE}"
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
        raise HelixError(
            f"{idx} is truncated: {size} bytes, and the header alone takes {HEADER.size}. Copy it again "
            f"from its source. {REMAKE}"
        )
    _, version, code, sequences, ends = HEADER.unpack(header)
    if version != 1:
        raise HelixError(f"{idx} has index version {version}. Valid: 1. {REMAKE}")
    if code not in TOKEN_TYPES:
        valid = listed(f"{code} ({name})" for code, name in TOKEN_TYPES.items())
        raise HelixError(f"{idx} has token type {code}. Valid: {valid}. {REMAKE}")
    expected = HEADER.size + 12 * sequences + 8 * ends
    if size < expected:
        raise HelixError(
            f"{idx} is truncated: {size} bytes, but its header announces {sequences} sequences and "
            f"{ends} document ends, which take {expected}. Copy it again from its source. {REMAKE}"
        )
    if ends < 1 or size not in (expected, expected + sequences):
        raise HelixError(
            f"{idx} is corrupt: {size} bytes, but its header announces {sequences} sequences and "
            f"{ends} document ends, which take {expected}. Copy it again from its source. {REMAKE}"
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
        raise HelixError(
            f"{prefix}.idx is corrupt: its last sequence of {lengths[-1]} tokens begins at byte "
            f"{last_offset} of {expected}. Copy it again from its source. {REMAKE}"
        )


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


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Megatron's `--data-path`: (prefixes, weights). One prefix, several, or weight-prefix pairs.

    Raises:
        HelixError: nothing is given, a pair lacks its weight, or a weight is not positive.
    """
    from megatron.core.datasets.utils import get_blend_from_list

    if not data_path:
        raise HelixError("--data-path is empty. Give a prefix, or pairs of a weight and a prefix.")
    prefixes, weights = get_blend_from_list(list(data_path))
    if weights is None:
        # megatron-core means to refuse weights for some prefixes only, but takes them for prefixes.
        legal = len(prefixes) == 1 or not any(map(_is_number, prefixes))
    else:
        legal = all(0 < weight < float("inf") for weight in weights)
    if not legal:
        raise HelixError(
            f"--data-path {' '.join(data_path)} mixes weights and prefixes. Valid: one prefix; several "
            "prefixes; or pairs of a positive weight and a prefix, such as 0.3 first 0.7 second."
        )
    return prefixes, weights


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_megatron_datasets(
    data_path: Sequence[str],
    tokenizer: Tokenizer,
    sequence_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    *,
    seed: int = 1234,
    split: str = "969,30,1",
    data_cache_path: str | None = None,
) -> tuple[Any, Any, Any]:
    """Train, valid and test `GPTDataset` (`BlendedDataset` for several prefixes).

    Samples hold `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each
    [sequence_length]; no attention mask. Works in one process; with torch.distributed all ranks must
    call it, and rank 0 builds the indices first.

    Args:
        data_path: see `parse_data_path`.
        num_samples: wanted at least from each split; data repeat as often as that needs, but for
            prefixes without weights, of which one epoch is all. None: one epoch. 0: do not build.
        split: Megatron's `--split`; a split of weight 0 is None.
        data_cache_path: directory for the indices; None: `PREFIX/cache` of the first prefix.

    Raises:
        HelixError: a file or setting that cannot work, before an index is built; or, while building, a
            cache directory that cannot be written.
    """
    check_order(sequence_length, seed)
    prefixes, weights = parse_data_path(data_path)
    summaries, wanted = check_data_path(
        data_path, tokenizer.vocab_size, sequence_length, num_samples, split
    )

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    cache = _cache_directory(data_cache_path or os.path.join(prefixes[0], "cache"), summaries)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=(prefixes, weights),
        split=split,
        path_to_cache=cache,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # For an empty split or no samples GPTDataset would look for enough epochs of nothing for ever.
    config.split_matrix = [
        bounds if is_wanted else None
        for bounds, is_wanted in zip(config.split_matrix, wanted, strict=True)
    ]
    builder = BlendedMegatronDatasetBuilder(GPTDataset, list(num_samples), lambda: True, config)
    try:
        with _process_group():
            train, valid, test = builder.build()
    except Exception as error:
        # With torch.distributed the builder wraps the OSError in a bare Exception.
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            raise HelixError(
                f"cannot keep the indices of the dataset in {cache}: {error.__cause__ or error}. Name a "
                "directory that you may write to: --data-cache-path DIR."
            ) from error
        raise
    return train, valid, test


def check_data_path(
    data_path: Sequence[str],
    vocab_size: int,
    sequence_length: int,
    num_samples: tuple[int | None, int | None, int | None],
    split: str,
) -> tuple[list[IndexSummary], list[bool]]:
    """Check all that `build_megatron_datasets` will read: a summary per prefix, and which splits are wanted.

    Reads headers and sizes only, so that it can run before any rank starts.

    Raises:
        HelixError: any file or setting that cannot work.
    """
    prefixes, weights = parse_data_path(data_path)
    if weights is not None and None in num_samples:
        raise HelixError("--data-path with weights needs a number of samples for every split.")
    if any(number is not None and number < 0 for number in num_samples):
        raise HelixError(
            f"{listed(num_samples)} samples were asked for. Ask for 0 or more of each."
        )
    summaries = [check_indexed_dataset(prefix, vocab_size) for prefix in prefixes]
    one_epoch = weights is None and len(prefixes) > 1
    wanted = [
        share > 0 and number != 0
        for share, number in zip(parse_split(split), num_samples, strict=True)
    ]
    for summary, part in itertools.product(summaries, range(len(SPLITS))):
        if wanted[part]:
            whole = one_epoch or num_samples[part] is None
            _check_part(summary, part, split, sequence_length + 1 if whole else 1)
    return summaries, wanted


def _check_part(summary: IndexSummary, part: int, split: str, needed: int) -> None:
    bounds = split_bounds(split, len(summary.lengths))
    part_lengths = summary.lengths[bounds[part] : bounds[part + 1]]
    tokens = int(part_lengths.sum(dtype=np.int64))
    if tokens < needed:
        raise HelixError(
            f"the {SPLITS[part]} part of {summary.prefix} has {len(part_lengths)} of its "
            f"{len(summary.lengths)} documents with {tokens} tokens, but needs at least {needed} "
            f"(--split {split}). Give {SPLITS[part]} a larger weight, or 0 to leave it out, or use more "
            "documents, or a shorter sequence."
        )


def _cache_directory(directory: str, summaries: Sequence[IndexSummary]) -> str:
    """A directory of its own for these lengths.

    megatron-core names cached indices by the dataset's path; after a dataset is made anew at the same
    path it would silently use indices that point elsewhere. Indices depend on nothing but the lengths.
    """
    digests = "".join(summary.digest for summary in summaries)
    return os.path.join(directory, hashlib.blake2b(digests.encode(), digest_size=8).hexdigest())


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """A process group of one, if there is none: `BlendedDataset` asks for its rank whenever it caches."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
