"""`scripts/preprocess_data.py`: what it writes, what it refuses, and that it leaves nothing half-written."""

from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from waiting import printed_afresh

from helix_megatron.data import documents
from helix_megatron.data import preprocess as module
from helix_megatron.data.indexed_files import check_indexed_dataset
from helix_megatron.data.preprocess import main
from helix_megatron.data.text import ByteTokenizer, HuggingFaceTokenizer

SENTENCE = "The quick brown fox jumps over the lazy dog while the dog dreams of the fox."
RECORDS = [{"text": f"{SENTENCE} ({k})", "title": f"Title {k}", "n": k} for k in range(50)]
PARAGRAPHS = "--split-documents blank-line --tokenizer-model t.json"
SCRIPT = Path(__file__).parents[2] / "scripts" / "preprocess_data.py"


def train_bpe(path: Path, *special_tokens: str) -> Path:
    """A small byte-level BPE tokenizer that can say anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCE] * 9, trainer)
    tokenizer.save(str(path))
    return path


def text_of(ids, tokenizer=None) -> str:
    """The text of token ids; special tokens appear by name."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer._backend.decode(list(map(int, ids)), skip_special_tokens=False)
    text = b"".join(b"<|endoftext|>" if token == 256 else bytes([token]) for token in map(int, ids))
    return text.decode(errors="replace")


@pytest.fixture(autouse=True)
def in_directory(tmp_path, monkeypatch):
    """Every test has an empty working directory, whose listing tells what was left behind."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus():
    """The name of a file of JSON lines."""
    lines = [json.dumps(record) + "\n" for record in RECORDS]
    Path("corpus.jsonl").write_text("".join(lines))
    return "corpus.jsonl"


def run(*flags: str, status: int = 0) -> None:
    """The command with these flags; its exit code must be `status`."""
    if status:
        with pytest.raises(SystemExit) as leaving:
            main(flags)
        assert leaving.value.code == status
    else:
        main(flags)


def documents_of(prefix: str, tokenizer=None) -> list[str]:
    """The texts that megatron-core reads."""
    indexed = IndexedDataset(prefix)
    return [text_of(indexed[k], tokenizer) for k in range(len(indexed))]


def listing() -> set[str]:
    """All names below the working directory, hidden ones too."""
    return {str(path) for path in Path().rglob("*")}


# ------------------------------------------------------------------ what it writes


def test_json_lines_to_bytes(corpus, capsys):
    """Megatron's names for the output, and at the end what was done and how to use it."""
    run("--input", corpus, "--output-prefix", "out", "--append-eod")
    assert listing() == {corpus, "out_text_document.bin", "out_text_document.idx"}
    texts = [record["text"] for record in RECORDS]
    assert documents_of("out_text_document") == [text + "<|endoftext|>" for text in texts]
    summary = check_indexed_dataset("out_text_document", vocab_size=257)
    assert (summary.documents, summary.tokens) == (50, sum(map(len, texts)) + 50)
    printed, bar = capsys.readouterr()
    size = os.path.getsize(corpus)
    counts = f"50 documents, {summary.tokens:,} tokens, {size:,} bytes, "
    assert re.fullmatch(
        re.escape(counts) + r"\d+\.\d s \(\d+\.\d MB/s\)\n--data-path out_text_document\n", printed
    )
    assert re.search(r"tokenizing: 100%.*B/s", bar)


def test_a_tokenizer_file_and_several_keys(corpus):
    """One dataset per key; without --append-eod the text is all there is."""
    train_bpe(Path("tokenizer.json"), "<eos>")
    keys = ("title", "text")
    flags = ("--tokenizer-model", "tokenizer.json", "--json-keys", *keys)
    run("--input", corpus, "--output-prefix", "out", *flags)
    for key in keys:
        texts = documents_of(f"out_{key}_document", HuggingFaceTokenizer("tokenizer.json"))
        assert texts == [record[key] for record in RECORDS]


def test_a_tokenizer_file_is_read_anew(corpus):
    """A second call in one process must not use what was at the path before."""
    flags = ("--input", corpus, "--output-prefix", "out", "--tokenizer-model", "t.json")
    for special_tokens in (["<eos>"], ["<pad>", "<eos>"]):
        train_bpe(Path("t.json"), *special_tokens)
        run(*flags, "--append-eod", "--overwrite")
        texts = documents_of("out_text_document", HuggingFaceTokenizer("t.json"))
        assert texts == [record["text"] + "<eos>" for record in RECORDS]


def test_plain_text_by_file_and_by_paragraph(capsys):
    """A document per file, or one between blank lines; bytes stay as they are."""
    Path("a.txt").write_bytes(b"\n\nfirst\nline\n\n \t\r\nsecond \xff\r\n")
    Path("b.txt").write_bytes(b"third")
    Path("c.txt").touch()
    run("--input", "a.txt", "b.txt", "c.txt", "--output-prefix", "files")
    indexed = IndexedDataset("files_text_document")
    assert bytes(indexed[0].astype(np.uint8)) == Path("a.txt").read_bytes()
    assert [len(document) for document in indexed[0:2]] == [28, 5]
    rule = ("--split-documents", "blank-line")
    run("--input", "a.txt", "b.txt", "--output-prefix", "parts", *rule)
    texts = ["first\nline\n", "second \ufffd\r\n", "third"]
    assert documents_of("parts_text_document") == texts
    assert capsys.readouterr().err.count("tokenizing: 100%") == 2


def test_input_is_told_by_content_or_flag(corpus, capsys):
    """And said. Compressed text is counted as what it holds; a mark in front of a text is no text."""
    lines = b'\n{"text": "\\ufeffas JSON"}\n\n{"text": "more"}\n'
    Path("part-00000").write_bytes(gzip.compress(lines))
    Path("b.txt").write_bytes(b"\xef\xbb\xbf{a}")
    run("--input", "part-00000", "b.txt", "--output-prefix", "auto")
    assert documents_of("auto_text_document") == ["as JSON", "more", "{a}"]
    printed, errors = capsys.readouterr()
    assert "reading part-00000 as JSON lines; b.txt as plain text\n" in errors
    assert f", {len(lines) - 2 + 3} bytes, " in printed, "but for blank lines"
    run("--input", corpus, "--output-prefix", "text", "--input-format", "text")
    assert documents_of("text_text_document") == [Path(corpus).read_text()]


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=12), limit=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_any_text_survives_in_batches_of_any_size(tmp_path_factory, texts, limit):
    """Where one batch ends and the next begins must not show."""
    directory = tmp_path_factory.mktemp("any")
    texts = [text.removeprefix("\ufeff") for text in texts]
    (directory / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BATCH_BYTES", limit)
        flags = ("--input", f"{directory}/x.jsonl", "--output-prefix", f"{directory}/o")
        empty = not any(texts)
        run(*flags, status=2 if empty else 0)
    if not empty:
        assert documents_of(f"{directory}/o_text_document") == [text for text in texts if text]


def test_workers_write_what_one_process_writes(corpus, monkeypatch):
    """Processes finish in any order; the files are the same byte for byte."""
    train_bpe(Path("tokenizer.json"), "<eos>")
    monkeypatch.setattr(documents, "BATCH_BYTES", 100)
    monkeypatch.setattr(module, "BATCHES_IN_FLIGHT", 2)
    flags = ("--tokenizer-model", "tokenizer.json", "--append-eod")
    run("--input", corpus, "--output-prefix", "one", *flags)
    run("--input", corpus, "--output-prefix", "two", *flags, "--workers", "2")
    for suffix in ("bin", "idx"):
        one, two = (Path(f"{name}_text_document.{suffix}").read_bytes() for name in ("one", "two"))
        assert one == two


def test_workers_start_without_torch():
    """Every worker would spend a second on it, and needs none."""
    assert printed_afresh("import helix_megatron.data.preprocess") == ["[]"]


@pytest.mark.parametrize("vocab_size", [257, 65_499, 65_500, 100_000])
def test_token_types_are_megatrons(vocab_size):
    """Restated here to spare workers the import; it must not drift."""
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = vocab_size
    assert module._token_type(tokenizer) == DType.optimal_dtype(vocab_size)


def test_the_script_is_the_command(corpus, monkeypatch, capsys):
    """`scripts/preprocess_data.py` as a user calls it."""
    flags = ["--input", corpus, "--output-prefix", "out"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "--data-path out_text_document" in capsys.readouterr().out


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("line", "message", "workers"),
    [
        ('{"text": "cut', "line 51 is not valid JSON: Unterminated .* column 10 ", 1),
        ("[1]", r"corpus\.jsonl, line 51 holds a JSON list, not an object", 1),
        ("[1]", r"corpus\.jsonl, line 51 holds a JSON list, not an object", 2),
        ('{"body": "x"}', r"the key 'text' is missing; .* hold strings: body\. Choose with", 1),
        ('{"text": 7}', "line 51: the key 'text' is int; a string is needed.* strings: none", 1),
        ('{"text": "\\ud800"}', "line 51 has half a surrogate pair", 1),
        ("[" * 100_000, "line 51 is not valid JSON: maximum recursion", 1),
    ],
)
def test_a_bad_line_is_named(corpus, capsys, line, message, workers):
    """File, line and what to do; nothing is left of the 50 good lines before it."""
    with Path(corpus).open("a") as stream:
        stream.write(line + "\n")
    run("--input", corpus, "--output-prefix", "out", "--workers", str(workers), status=2)
    assert re.search(message, one_paragraph(capsys))
    assert listing() == {corpus}


def one_paragraph(capsys) -> str:
    """The error that was printed, its lines joined, without the progress bar before it."""
    printed = capsys.readouterr().err.split("preprocess_data.py: error: ")
    assert len(printed) == 2
    assert "Traceback" not in printed[1]
    return " ".join(printed[1].split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input missing.txt", r"the input file missing\.txt does not exist \(looked from /"),
        ("--input .", r"the input file \. is a directory"),
        ("--input a.txt --workers 0", "--workers is 0"),
        ("--input a.txt --output-prefix no/out", r"directory no of --output-prefix does not exist"),
        ("--input a.txt --json-keys body", "--json-keys body has no meaning for plain text"),
        (
            "--input a.jsonl --json-keys text text",
            "--json-keys text text: the keys name the output",
        ),
        ("--input a.jsonl --json-keys a/b", r"a/b: the keys name .* has no /\. Rename"),
        ("--input a.jsonl --split-documents file", "has no meaning for JSON lines"),
        ("--input a.txt --tokenizer-model no.json", r"the tokenizer file no\.json does not exist"),
        ("--input a.txt --eod-token x", "--tokenizer-type byte has a fixed vocabulary"),
        ("--input empty.txt a.jsonl", r"empty\.txt, a\.jsonl has no text \(1 empty documents\)"),
        ("--input latin.txt --tokenizer-model t.json", r"latin\.txt, line 4 is not UTF-8: .* 0xe9"),
        (f"--input latin.txt {PARAGRAPHS}", r"latin\.txt, line 4 is not UTF-8"),
        (f"--input last.txt {PARAGRAPHS}", r"last\.txt, line 4 is not UTF-8"),
        ("--input list", "list, line 1 holds a JSON list, not an object"),
        ("--input half.gz", r"half\.gz cannot be decompressed: .* It is damaged or incomplete"),
    ],
)
def test_wrong_input_is_one_paragraph(capsys, flags, message):
    """Exit code 2, the values and what to try; nothing is left behind."""
    Path("a.txt").write_text("text")
    Path("a.jsonl").touch()
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes(b"\n\ngood\ncaf\xe9\n\nend")
    Path("last.txt").write_bytes(b"good\n\ngood\ncaf\xe9")
    Path("half.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    Path("list").write_text('[{"text": "x"}]')
    train_bpe(Path("t.json"), "<eos>")
    before = listing()
    prefix = () if "--output-prefix" in flags else ("--output-prefix", "out")
    run(*flags.split(), *prefix, status=2)
    assert re.search(message, one_paragraph(capsys))
    assert listing() == before


def test_existing_output_is_kept_unless_told(corpus, capsys):
    """Hours of work are not replaced by a slip; --overwrite replaces them at once."""
    run("--input", corpus, "--output-prefix", "out")
    Path("b.txt").write_text("new")
    flags = ("--input", "b.txt", "--output-prefix", "out")
    capsys.readouterr()
    run(*flags, status=2)
    message = "out_text_document.bin, out_text_document.idx exists. .* replace it with --overwrite"
    assert re.search(message, one_paragraph(capsys))
    assert len(documents_of("out_text_document")) == 50
    run(*flags, "--overwrite")
    assert documents_of("out_text_document") == ["new"]


# ------------------------------------------------------------------ nothing half-written


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1)]
)
def test_an_interrupted_run_leaves_nothing(corpus, monkeypatch, number, workers):
    """A scheduler's SIGTERM or Ctrl-C in the middle of writing, over an older output that must live."""
    run("--input", corpus, "--output-prefix", "out")
    before = {name: Path(name).read_bytes() for name in listing()}
    add_documents, calls = module.add_documents, []

    def interrupted(*args) -> None:
        add_documents(*args)
        calls.append(args)
        if len(calls) == 3:
            assert any(".partial-" in name for name in listing())
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "add_documents", interrupted)
    monkeypatch.setattr(documents, "BATCH_BYTES", 500)
    handler = signal.getsignal(signal.SIGTERM)
    of_shell = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # shells ignore it in the background
    flags = ("--input", corpus, "--output-prefix", "out", "--overwrite")
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--workers", str(workers)])
    assert ended.value.code == 128 + number
    signal.signal(signal.SIGINT, of_shell)
    assert {name: Path(name).read_bytes() for name in listing()} == before
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_killed_worker_is_an_error_not_a_wait(corpus, capsys, monkeypatch):
    """The kernel kills what takes too much memory; a pool that waits for it would hang for ever."""
    monkeypatch.setattr(module, "_start_worker", os.abort)
    run("--input", corpus, "--output-prefix", "out", "--workers", "2", status=2)
    assert "one of the 2 workers was killed" in one_paragraph(capsys)
    assert listing() == {corpus}


def test_a_full_disk_is_a_sentence(corpus, capsys, monkeypatch):
    """The operating system's own words, and that nothing was written."""

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "add_documents", full)
    run("--input", corpus, "--output-prefix", "out", status=2)
    message = "No space left on device. Nothing was written to the output."
    assert message in one_paragraph(capsys)
    assert listing() == {corpus}
