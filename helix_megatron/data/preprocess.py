"""Text files or JSON lines to Megatron's `.bin/.idx`.

    reader (this process)        encoders (--workers)         writer (this process)
    batches of raw documents --> token ids and lengths   -->  IndexedDatasetBuilder, in input order

The flags are those of Megatron-LM's `tools/preprocess_data.py`, and so are the output's names. A run that
fails or is interrupted leaves nothing behind. The output does not depend on the number of workers.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from helix_megatron.arguments import Parser, exit_on_error
from helix_megatron.data.documents import (
    BOM,
    DOCUMENT_RULES,
    INPUT_FORMATS,
    Document,
    Input,
    batches,
    describe,
    is_compressed,
    read_documents,
    recognise,
)
from helix_megatron.data.indexed_files import add_documents, write_indexed_datasets
from helix_megatron.data.text import TOKENIZER_TYPES, Tokenizer, build_tokenizer
from helix_megatron.errors import HelixError, listed
from helix_megatron.flags import INPUT_FILE, OUTPUT_FILE, one_line, whole

BATCHES_IN_FLIGHT = 4  # per worker; bounds memory when writing is slower than reading
MOST_WORKERS = 4096


@dataclass(frozen=True)
class Encoding:
    """How a document becomes token ids; sent to the workers with every batch."""

    tokenizer_type: str | None = None
    tokenizer_model: str | None = None
    eod_token: str | None = None
    append_eod: bool = False
    json_keys: tuple[str, ...] = ("text",)


@dataclass
class EncodedBatch:
    """The documents of a batch: per JSON key, all token ids [tokens] and the length of each document."""

    tokens: dict[str, np.ndarray]
    lengths: dict[str, list[int]]
    empty: int
    size: int


@dataclass
class Summary:
    """What was written. `prefixes` are what `--data-path` takes; `size` is in bytes of input."""

    prefixes: list[str]
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    size: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        skipped = f" ({self.empty:,} empty ones skipped)" if self.empty else ""
        return (
            f"{self.documents:,} documents{skipped}, {self.tokens:,} tokens, {self.size:,} bytes, "
            f"{self.seconds:.1f} s ({self.size / 1e6 / self.seconds:.1f} MB/s)\n"
            f"--data-path {' '.join(self.prefixes)}"
        )


# ------------------------------------------------------------------ encode


@functools.lru_cache(maxsize=1)
def _tokenizer(encoding: Encoding) -> Tokenizer:
    """One tokenizer per process."""
    return build_tokenizer(encoding.tokenizer_type, encoding.tokenizer_model, encoding.eod_token)


def encode(encoding: Encoding, batch: list[Document]) -> EncodedBatch:
    """Token ids of the documents, without those that have none.

    Raises:
        HelixError: a line that is not a JSON object with the keys as strings, or text that is not
            UTF-8 where the tokenizer needs it; with the file and the line.
    """
    tokenizer = _tokenizer(encoding)
    result = EncodedBatch({}, {}, empty=0, size=sum(len(document.content) for document in batch))
    records = [_texts(document, encoding.json_keys) for document in batch]
    end = np.array([tokenizer.eod] if encoding.append_eod else [], dtype=np.int32)
    for key in encoding.json_keys:
        encoded = _tokenize(tokenizer, batch, [record[key] for record in records])
        kept = [ids for ids in encoded if len(ids)]
        result.empty += len(encoded) - len(kept)
        result.lengths[key] = [len(ids) + len(end) for ids in kept]
        parts = [part for ids in kept for part in (ids, end)]
        result.tokens[key] = np.concatenate([end[:0], *parts]).astype(_token_type(tokenizer))
    return result


def _texts(document: Document, keys: Sequence[str]) -> dict[str, bytes]:
    """The texts of a document by key, in UTF-8 (raw text as it is)."""
    if not document.is_json:
        return {keys[0]: document.content}
    where = f"{document.path}, line {document.line}"
    try:
        record = json.loads(document.content.rstrip())
    except (ValueError, RecursionError) as error:
        # JSON counts lines from the beginning of this one.
        problem = str(error).replace("line 1 column", "column")
        raise HelixError(
            f"{where} is not valid JSON: {problem}. Every line must be one object, such as "
            '{"text": "..."}. For plain text use --input-format text.'
        ) from error
    if not isinstance(record, dict):
        raise HelixError(
            f"{where} holds a JSON {type(record).__name__}, not an object. Every line must be one "
            'object, such as {"text": "..."}.'
        )
    for key in keys:
        if not isinstance(record.get(key), str):
            found = f"is {type(record[key]).__name__}" if key in record else "is missing"
            strings = [name for name, value in record.items() if isinstance(value, str)]
            raise HelixError(
                f"{where}: the key {key!r} {found}; a string is needed. Keys of this line that hold "
                f"strings: {listed(strings)}. Choose with --json-keys."
            )
    try:
        return {key: record[key].encode().removeprefix(BOM) for key in keys}
    except UnicodeEncodeError as error:
        raise HelixError(
            f"{where} has half a surrogate pair, which is no character: {error}. Correct the line."
        ) from error


def _tokenize(
    tokenizer: Tokenizer, batch: list[Document], texts: Sequence[bytes]
) -> list[np.ndarray]:
    try:
        return tokenizer.tokenize_batch(texts)
    except UnicodeDecodeError:
        for document, text in zip(batch, texts, strict=True):
            try:
                text.decode()
            except UnicodeDecodeError as error:
                line = document.line + text.count(b"\n", 0, error.start)
                raise HelixError(
                    f"{document.path}, line {line} is not UTF-8: {error}. Convert the file, for "
                    "example with iconv, or take --tokenizer-type byte, which reads any bytes."
                ) from error
        raise


def _token_type(tokenizer: Tokenizer) -> Any:
    """As megatron-core's `DType.optimal_dtype`, which takes seconds to import in every worker."""
    return np.uint16 if tokenizer.vocab_size < 65500 else np.int32


def _encoded(
    encoding: Encoding, batches: Iterable[list[Document]], workers: int
) -> Generator[EncodedBatch]:
    """The batches encoded, in order. Closing the generator ends the workers."""
    if workers == 1:
        yield from (encode(encoding, batch) for batch in batches)
        return
    # Not forked: this process has threads (torch's, the progress bar's) that a fork would cut off.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pending: collections.deque[Future[EncodedBatch]] = collections.deque()
    try:
        for batch in batches:
            pending.append(executor.submit(encode, encoding, batch))
            if len(pending) >= BATCHES_IN_FLIGHT * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise HelixError(
            f"one of the {workers} workers was killed, most likely for want of memory. Try fewer "
            "--workers."
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the main process's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    encoding: Encoding,
    *,
    input_format: str = "auto",
    split_documents: str | None = None,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Write `PREFIX_{key}_document.bin` and `.idx` for every key (`text` for plain text).

    Args:
        split_documents: for plain text, one of `DOCUMENT_RULES`; None is `file`.
        workers: processes that encode; 1 encodes in this process.
    """
    files = _check(inputs, encoding, input_format, split_documents, workers)
    prefixes = [f"{output_prefix}_{key}_document" for key in encoding.json_keys]
    _tokenizer.cache_clear()  # the file may have changed since the last call
    token_type = _token_type(_tokenizer(encoding))
    documents = read_documents(files, split_documents or "file")
    summary = Summary(prefixes)
    # How much text a compressed file holds shows when it has been read.
    known = not any(map(is_compressed, inputs))
    total = sum(map(os.path.getsize, inputs)) if known else None
    print(describe(files), file=sys.stderr)
    with (
        write_indexed_datasets(prefixes, token_type, overwrite=overwrite) as builders,
        tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing") as bar,
        contextlib.closing(_encoded(encoding, batches(documents), workers)) as encoded,
    ):
        begin = time.perf_counter()
        for batch in encoded:
            for key, builder in zip(encoding.json_keys, builders, strict=True):
                add_documents(builder, batch.tokens[key], batch.lengths[key])
                summary.documents += len(batch.lengths[key])
                summary.tokens += len(batch.tokens[key])
            summary.empty += batch.empty
            bar.update(batch.size)
        summary.size = total or int(bar.n)
        bar.update(summary.size - bar.n)  # separators between documents belong to no batch
        for prefix, builder in zip(prefixes, builders, strict=True):
            if not builder.sequence_lengths:
                raise HelixError(
                    f"there is nothing to write to {prefix}.bin: {listed(inputs)} has no text "
                    f"({summary.empty} empty documents). Check the input, or --json-keys."
                )
        summary.seconds = time.perf_counter() - begin
    return summary


def _check(
    inputs: Sequence[str], encoding: Encoding, input_format: str, split: str | None, workers: int
) -> list[Input]:
    for path in inputs:
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            state = "cannot be read" if os.path.isfile(path) else "does not exist"
            raise HelixError(
                f"the input file {path} {'is a directory' if os.path.isdir(path) else state} (looked "
                f"from {os.getcwd()}). Valid: files of text or of JSON lines."
            )
    if workers < 1:
        raise HelixError(f"--workers {workers} is not positive. Valid: 1 to {os.cpu_count()}.")
    files = recognise(inputs, input_format)
    json_inputs = [path for path, is_json in files if is_json]
    keys = encoding.json_keys
    if len(set(keys)) < len(keys) or any(os.sep in key for key in keys):
        raise HelixError(
            f"--json-keys {' '.join(keys)}: the keys name the output files, so every key is given once "
            f"and has no {os.sep}. Rename the key in the input."
        )
    if keys != ("text",) and len(json_inputs) < len(inputs):
        raise HelixError(
            f"--json-keys {' '.join(keys)} has no meaning for plain text, and not all input is JSON "
            "lines. Leave --json-keys out, or set --input-format jsonl."
        )
    if split is not None and len(json_inputs) == len(inputs):
        raise HelixError(
            f"--split-documents {split} has no meaning for JSON lines, where every line is a "
            "document. Leave it out, or set --input-format text."
        )
    return files


# ------------------------------------------------------------------ command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags; Megatron's where it has one."""
    parser = Parser(prog="preprocess_data.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--input", dest="inputs", type=INPUT_FILE, nargs="+", required=True, metavar="FILE"
    )
    parser.add_argument("--output-prefix", type=OUTPUT_FILE, required=True, metavar="PREFIX")
    parser.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="what the files hold; auto looks at their names and their first lines",
    )
    parser.add_argument("--json-keys", type=one_line, nargs="+", default=["text"], metavar="KEY")
    parser.add_argument(
        "--split-documents",
        choices=DOCUMENT_RULES,
        help="what a document of plain text is: a file (default), or what lies between blank lines",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=TOKENIZER_TYPES,
        help="how text becomes tokens (default: HuggingFaceTokenizer with --tokenizer-model, else byte)",
    )
    parser.add_argument(
        "--tokenizer-model", type=INPUT_FILE, metavar="FILE", help="the file, a tokenizer.json"
    )
    parser.add_argument(
        "--eod-token",
        type=one_line,
        metavar="TEXT",
        help="the token of that file that ends a document",
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end every document with that token"
    )
    parser.add_argument("--workers", type=whole(largest=MOST_WORKERS), default=1, metavar="N")
    parser.add_argument("--overwrite", action="store_true", help="replace output that exists")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _clean_termination() -> Iterator[None]:
    """Make SIGTERM an exception, as SIGINT is, so that temporary files are removed."""

    def leave(signal_number: int, frame: Any) -> None:
        raise SystemExit(128 + signal_number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> None:
    """The command `scripts/preprocess_data.py`. Exits with code 2 and one paragraph for wrong input."""
    with exit_on_error("preprocess_data.py"), _clean_termination():
        settings = vars(parse_arguments(argv))
        settings["json_keys"] = tuple(settings["json_keys"])
        names = [field.name for field in dataclasses.fields(Encoding)]
        encoding = Encoding(**{name: settings.pop(name) for name in names})
        try:
            print(preprocess(encoding=encoding, **settings))
        except OSError as error:
            raise HelixError(f"{error}. Nothing was written to the output.") from error
