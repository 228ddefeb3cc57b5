"""Text and its tokens: a default text, its bytes as a dataset, and tokenizers for Megatron's datasets.

The default text is the Python language reference that CPython carries for `help()`. Every byte is a
token, so there is no tokenizer and nothing to download. A `ByteDataset` serves it, or a user's files, as
samples with the keys of Megatron's `GPTDataset`. The tokenizers are for `.bin/.idx` files, which mark
the end of a document with a token of its own.
"""

from __future__ import annotations

import functools
import math
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from helix_megatron.checkpoint.foreign import MOST_JSON, read_bytes
from helix_megatron.data.documents import open_input
from helix_megatron.errors import HelixError, listed

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 256
SEPARATOR = b"\n\n"  # between topics and between files
SPLITS = ("train", "valid", "test")
TOKENIZER_TYPES = ("byte", "HuggingFaceTokenizer")
EOD_TEXT = "<|endoftext|>"
EOD_NAMES = (EOD_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<eod>", "<EOD>", "[EOS]", "[EOD]")


def default_text() -> bytes:
    """The Python language reference (`pydoc_data.topics`), its topics sorted by name.

    About 460 kB. The same for every run of one Python version; the reference itself differs between
    Python versions.

    Raises:
        HelixError: this Python was packaged without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise HelixError(
            "this Python lacks the module pydoc_data.topics, the default text (some distributions "
            "leave it out). Name a text of your own: --text FILE."
        ) from error
    return SEPARATOR.join(topics[name].encode() for name in sorted(topics))


def read_text(paths: Sequence[str | os.PathLike[str]]) -> bytes:
    """The bytes of the files, in the order given, with a blank line between them.

    Raises:
        HelixError: no file is named, one cannot be read, or all are empty.
    """
    if not paths:
        raise HelixError("no text file is named. Give at least one: --text FILE.")
    texts = [_read_file(Path(path)) for path in paths]
    if not any(texts):
        names = ", ".join(str(path) for path in paths)
        raise HelixError(
            f"the text is empty: {names} has 0 bytes. Name a file with text, or leave --text out to "
            "use the Python language reference."
        )
    return SEPARATOR.join(texts)


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise HelixError(f"{path} is a directory. Name its files, for example --text {path}/*.txt.")
    try:
        with open_input(str(path)) as stream:
            return stream.read()
    except OSError as error:
        raise HelixError(
            f"cannot read the text file {path}: {error.strerror} (looked for it from {Path.cwd()}). "
            "Check the name, or leave --text out to use the Python language reference."
        ) from error


def parse_split(split: str) -> tuple[float, float, float]:
    """Megatron's `--split`: the shares of train, valid and test, which sum to 1.

    Missing weights are 0, so `"1"` is all for training. Weights need not sum to anything:
    `"969,30,1"` is 96.9 %, 3 % and 0.1 %.

    Raises:
        HelixError: not one to three non-negative numbers, or all are zero.
    """
    # Megatron reads digits and points and skips everything else: it takes 1e3 for 1 and 3, and -1 for 1.
    plain = set(split) <= set("0123456789., ")
    try:
        weights = [float(weight) for weight in split.split(",")] if plain else []
    except ValueError:
        weights = []
    if len(weights) > len(SPLITS) or not 0 < sum(weights) < math.inf:
        raise HelixError(
            f"--split {split!r} is not a list of weights for train, valid and test. Valid: one to "
            "three numbers of at least 0, not all 0, separated by commas, such as 969,30,1 or 9,1."
        )
    train, valid, test = [*weights, 0.0, 0.0][: len(SPLITS)]
    total = train + valid + test
    return train / total, valid / total, test / total


def split_bounds(split: str, size: int) -> tuple[int, int, int, int]:
    """Where train, valid and test begin and end in `size` elements: [b0, b1), [b1, b2), [b2, b3).

    Megatron's rounding (`BlendedMegatronDatasetBuilder._build_megatron_dataset_splits`).
    """
    train, valid, test = parse_split(split)
    # Summed one by one as Megatron does: another order of additions can round to another element.
    shares = (0.0, train, train + valid, train + valid + test)
    b0, b1, b2, b3 = (round(share * float(size)) for share in shares)
    return b0, b1, b2, b3


def split_text(text: bytes, split: str) -> tuple[bytes, bytes, bytes]:
    """The train, valid and test part of the text, consecutive; a part of weight 0 is empty."""
    b0, b1, b2, b3 = split_bounds(split, len(text))
    return text[b0:b1], text[b1:b2], text[b2:b3]


def check_order(sequence_length: int, seed: int) -> None:
    """Raise `HelixError` for a sequence length or seed that no dataset can have."""
    if sequence_length < 1:
        raise HelixError(f"sequence length {sequence_length} is not positive. Try 1024.")
    if not 0 <= seed < 2**32:
        raise HelixError(f"seed {seed} is out of range. Valid seeds: 0 to {2**32 - 1}.")


class ByteDataset:
    """A map-style dataset: windows of `sequence_length` + 1 bytes of a text, shuffled in every epoch.

    Windows start `sequence_length` bytes apart, so every byte is a label once per epoch, but for the
    first and for the rest at the end that fills no window. Sample k depends on the text, the sequence
    length, the seed and k alone. Indices beyond the first epoch continue with the order of the next.

    Args:
        text: the bytes; their values are the token ids, below `VOCAB_SIZE`.
        sequence_length: tokens in a sample.
        seed: of the order, in [0, 2³²).
        name: what to call the text in errors.

    Raises:
        HelixError: the text is shorter than one window, or a number is out of range.
    """

    def __init__(
        self,
        text: bytes,
        sequence_length: int,
        seed: int,
        name: str = "the text",
    ) -> None:
        check_order(sequence_length, seed)
        self.windows = (len(text) - 1) // sequence_length
        if self.windows < 1:
            shorter = f", or a sequence length of at most {len(text) - 1}" if len(text) > 1 else ""
            raise HelixError(
                f"{name} has {len(text)} bytes, too few for sequence length {sequence_length}: a sample "
                f"takes {sequence_length + 1}. Use a longer text{shorter}. If this is a part of a "
                "text, give it a larger weight in --split, or 0 to leave it out."
            )
        self.sequence_length = sequence_length
        self.seed = seed
        self._bytes = np.frombuffer(text, dtype=np.uint8)

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32), each [sequence_length].

        Raises:
            IndexError: a negative index.
        """
        import torch  # not above: preprocessing and its workers need this module without torch

        if index < 0:
            raise IndexError(f"sample {index}")
        epoch, position = divmod(index, self.windows)
        start = int(_epoch_order(self.seed, epoch, self.windows)[position]) * self.sequence_length
        window = torch.from_numpy(
            self._bytes[start : start + self.sequence_length + 1].astype(np.int64)
        )
        return {
            "tokens": window[:-1].clone(),
            "labels": window[1:].clone(),
            "loss_mask": torch.ones(self.sequence_length, dtype=torch.float32),
            "position_ids": torch.arange(self.sequence_length),
        }


# Two epochs of two datasets: an iteration can straddle an epoch, and training alternates with validation.
@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """A permutation of [0, windows)."""
    # numpy promises that RandomState's streams never change; its newer generators may.
    return np.random.RandomState([seed, epoch]).permutation(windows)


class Tokenizer(Protocol):
    """What preprocessing and `GPTDatasetConfig` need."""

    vocab_size: int
    eod: int
    unique_identifiers: OrderedDict[str, Any]

    def tokenize_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of each text, [tokens] of an integer dtype. Raises UnicodeDecodeError."""


class ByteTokenizer:
    """Every byte is a token; 256 ends a document."""

    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        # GPTDataset describes its tokenizer by these in the names of cached indices.
        self.unique_identifiers = OrderedDict([("class", "byte"), ("tokenizer_path", [])])

    def tokenize_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]


def read_tokenizer_file(path: str, otherwise: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer of the Hugging Face `tokenizers` library and its vocabulary, added tokens included.

    Truncation and padding in the file are switched off, for they would silently cut documents.

    Args:
        otherwise: what a user can give who has not the library.

    Raises:
        HelixError: the library is not installed, or the file is not one of its tokenizers.
    """
    try:
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise HelixError(
            f"{path} needs the package tokenizers, which is not installed. Try pip install tokenizers, or "
            f"{otherwise}."
        ) from error
    try:
        backend = Backend.from_buffer(read_bytes(Path(path), MOST_JSON))
        for special in (False, True):  # a template of tokens that are not there fails only here
            backend.decode(backend.encode("a", add_special_tokens=special).ids)
    except HelixError:
        raise
    except BaseException as error:  # tokenizers raises nothing narrower
        if not is_fault(error):
            raise
        raise HelixError(
            f"{path} is not a tokenizer file of the tokenizers library: {error!s:.500}. Export one with "
            f"tokenizer.save('tokenizer.json'), or give {otherwise}."
        ) from error
    backend.no_truncation()
    backend.no_padding()
    return backend, backend.get_vocab(with_added_tokens=True)


def is_fault(error: BaseException) -> bool:
    """Whether an exception is a fault of a tokenizer: the library's panics are no `Exception`s."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    Special tokens that the file would add around a text (BOS and the like) are not added: a document
    in a `.bin` file is ended by `eod` alone.

    Args:
        path: the JSON file, or a directory that holds `tokenizer.json`.
        eod_token: the text of the end-of-document token; None takes the first of `EOD_NAMES` known.

    Raises:
        HelixError: no such file, not a tokenizer, or no end-of-document token.
    """

    def __init__(self, path: str, eod_token: str | None = None) -> None:
        if os.path.isdir(path):
            path = os.path.join(path, "tokenizer.json")
        if not os.path.isfile(path):
            raise HelixError(
                f"the tokenizer file {path} does not exist. --tokenizer-model takes a tokenizer.json of "
                "the Hugging Face tokenizers library, or its directory; --tokenizer-type byte needs no "
                "file."
            )
        self._backend, self.vocab = read_tokenizer_file(path, "--tokenizer-type byte")
        # Ids may have gaps, so this is not the number of tokens.
        self.vocab_size = max(self.vocab.values(), default=-1) + 1
        self.eod = self._eod(path, eod_token)
        self.unique_identifiers = OrderedDict(
            [("class", "HuggingFaceTokenizer"), ("tokenizer_path", [path]), ("eod", str(self.eod))]
        )

    def _eod(self, path: str, eod_token: str | None) -> int:
        for name in EOD_NAMES if eod_token is None else (eod_token,):
            if name in self.vocab:
                return self.vocab[name]
        added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        missing = listed(EOD_NAMES) if eod_token is None else repr(eod_token)
        raise HelixError(
            f"{path} has no end-of-document token: its vocabulary of {len(self.vocab)} lacks {missing}. "
            f"Name one of its tokens with --eod-token; its special tokens are: {listed(added[:20])}."
        )

    def tokenize_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        decoded = [text.decode() for text in texts]
        encodings = self._backend.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def build_tokenizer(
    tokenizer_type: str | None = None,
    tokenizer_model: str | None = None,
    eod_token: str | None = None,
) -> Tokenizer:
    """The tokenizer that Megatron's flags name.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`; None: by file if one is given, else byte-level.
        tokenizer_model: file of a `HuggingFaceTokenizer`.
        eod_token: text of its end-of-document token.

    Raises:
        HelixError: an unknown type, settings that contradict each other, a file that does not load.
    """
    if tokenizer_type is None:
        tokenizer_type = "byte" if tokenizer_model is None else "HuggingFaceTokenizer"
    if tokenizer_type not in TOKENIZER_TYPES:
        raise HelixError(
            f"--tokenizer-type {tokenizer_type} is unknown. Valid: {listed(TOKENIZER_TYPES)}."
        )
    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None:
            raise HelixError(
                "--tokenizer-type HuggingFaceTokenizer needs --tokenizer-model FILE, a tokenizer.json."
            )
        return HuggingFaceTokenizer(tokenizer_model, eod_token)
    if tokenizer_model is not None or eod_token is not None:
        raise HelixError(
            "--tokenizer-type byte has a fixed vocabulary of 257 with end of document 256; "
            "--tokenizer-model and --eod-token have no meaning. Leave them out, or take "
            "--tokenizer-type HuggingFaceTokenizer."
        )
    return ByteTokenizer()
