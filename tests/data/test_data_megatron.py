"""Megatron's datasets as training meets them: right samples from right files, sentences for wrong ones."""

from __future__ import annotations

import shutil
import struct
import unittest.mock
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import utils as megatron_utils
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from test_preprocess import text_of, train_bpe

from helix_megatron.data.batches import KEYS, micro_batches
from helix_megatron.data.indexed_files import (
    add_documents,
    check_indexed_dataset,
    write_indexed_datasets,
)
from helix_megatron.data.megatron_datasets import build_megatron_datasets, parse_data_path
from helix_megatron.data.text import ByteTokenizer, build_tokenizer
from helix_megatron.errors import HelixError

SEQUENCE = 16
DOCUMENTS = [f"Document {k} says: {'la' * (k % 7)} {k * k}. ".encode() * 3 for k in range(40)]


def write(prefix: Path, documents: list[bytes], tokenizer=None, token_type=np.uint16) -> str:
    """A dataset of these documents, each ended by the end-of-document token."""
    tokenizer = tokenizer or ByteTokenizer()
    encoded = [[*ids, tokenizer.eod] for ids in tokenizer.tokenize_batch(documents)]
    with write_indexed_datasets([str(prefix)], token_type) as (builder,):
        add_documents(builder, np.concatenate(encoded), [len(ids) for ids in encoded])
    return str(prefix)


@pytest.fixture
def corpus(tmp_path):
    """The prefix of a byte-level dataset of `DOCUMENTS`."""
    return write(tmp_path / "corpus", DOCUMENTS)


def build(data_path, num_samples=(30, 0, 0), tokenizer=None, **settings):
    return build_megatron_datasets(
        data_path, tokenizer or ByteTokenizer(), SEQUENCE, num_samples, **settings
    )


def stream_of(dataset: GPTDataset) -> list[int]:
    """The tokens of one epoch in the order of its documents: samples unshuffled and joined."""
    place = np.argsort(dataset.shuffle_index)
    samples = [dataset[int(k)] for k in place]
    return [int(t) for s in samples for t in s["tokens"]] + [int(samples[-1]["labels"][-1])]


# ------------------------------------------------------------------ right samples


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_text_survives_the_way_through_files_and_samples(tmp_path, kind):
    """Text → tokens → .bin/.idx → GPTDataset → text; what is lost is less than one sample."""
    tokenizer = build_tokenizer()
    if kind == "bpe":
        file = train_bpe(tmp_path / "tokenizer.json", "<|endoftext|>")
        tokenizer = build_tokenizer(tokenizer_model=str(file))
    prefix = write(tmp_path / "corpus", DOCUMENTS, tokenizer)
    indexed = IndexedDataset(prefix)
    texts = [document.decode() + "<|endoftext|>" for document in DOCUMENTS]
    assert [text_of(indexed[k], tokenizer) for k in range(len(indexed))] == texts

    train, valid, test = build([prefix], (None, 0, 0), tokenizer, split="1")
    assert valid is None
    assert test is None
    text = "".join(texts[k] for k in train.document_index)
    stream = stream_of(train)
    assert text.startswith(text_of(stream, tokenizer))
    assert 0 <= sum(train.dataset.sequence_lengths) - len(stream) < SEQUENCE


def test_samples_have_the_keys_of_training(corpus):
    """No attention mask: at length L it would be L² values for every sample."""
    (train, *_) = build([corpus])
    sample = train[0]
    assert set(sample) == set(KEYS)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "tokens": (torch.int64, (SEQUENCE,)),
        "labels": (torch.int64, (SEQUENCE,)),
        "loss_mask": (torch.float32, (SEQUENCE,)),
        "position_ids": (torch.int64, (SEQUENCE,)),
    }
    assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()


def test_splits_have_their_own_documents(corpus):
    """No token of validation is trained on; more samples than an epoch has repeat the data."""
    train, valid, test = build([corpus], (100, 20, 5), split="6,3,1")
    parts = [set(dataset.indices.tolist()) for dataset in (train, valid, test)]
    assert parts == [set(range(24)), set(range(24, 36)), set(range(36, 40))]
    assert len(train) >= 100
    assert len(valid) >= 20
    assert len(test) >= 5
    assert build([corpus], (10, 10, 10), split="1,0,1")[1] is None


def test_weights_blend_and_repeat(tmp_path):
    """Weight-prefix pairs draw by weight, whatever the sizes; the cache serves the second build."""
    a = write(tmp_path / "a", [b"a" * 50] * 30)
    b = write(tmp_path / "b", [b"b" * 50] * 3)
    settings = {"split": "1", "data_cache_path": str(tmp_path / "cache")}
    (train, *_) = build(["1", a, "3", b], (400, 0, 0), **settings)
    first = [int(train[k]["tokens"].median()) for k in range(400)]
    assert first.count(ord("a")) == pytest.approx(100, abs=2)
    assert first.count(ord("b")) == pytest.approx(300, abs=2)
    (again, *_) = build(["1", a, "3", b], (400, 0, 0), **settings)
    assert [int(again[k]["tokens"].median()) for k in range(400)] == first
    assert not dist.is_initialized()


def test_prefixes_without_weights_are_one_epoch_of_all(tmp_path):
    """Their sizes are their weights, and the end of the data is a sentence."""
    prefixes = [
        write(tmp_path / name, [name.encode() * 50] * n) for name, n in (("a", 30), ("b", 10))
    ]
    (train, *_) = build([*prefixes, prefixes[0]], (10_000, 0, 0), split="1")
    assert len(train) == sum(n * 51 // SEQUENCE for n in (30, 10, 30))
    with pytest.raises(HelixError, match=r"exhausted.*with weights"):
        list(micro_batches(train, 8, 0, 1))


def test_a_dataset_made_anew_is_not_read_through_old_indices(tmp_path):
    """megatron-core names cached indices by path: with other documents there they point elsewhere."""
    cache = str(tmp_path / "cache")
    for documents in (DOCUMENTS, [b"new" * 9] * 11):
        for file in tmp_path.glob("corpus.*"):
            file.unlink()
        prefix = write(tmp_path / "corpus", documents)
        (train, *_) = build([prefix], (None, 0, 0), split="1", data_cache_path=cache)
        text = text_of(stream_of(train))
        expected = "".join(documents[k].decode() + "<|endoftext|>" for k in train.document_index)
        assert expected.startswith(text)
        assert len(expected) - len(text) < 14 * SEQUENCE


def first_samples(prefix: str, cache: str) -> list[list[int]]:
    """Runs on every rank: its samples of a blend and of its parts."""

    no_make = AssertionError("the wheel has the compiled helpers; nobody may run make")
    with unittest.mock.patch.object(megatron_utils, "compile_helpers", side_effect=no_make):
        (blend, *_) = build(["1", prefix, "1", prefix], (8, 0, 0), data_cache_path=cache)
        train, valid, _ = build([prefix], (8, 4, 0), split="3,1", data_cache_path=cache)
    return [d[k]["tokens"].tolist() for d in (blend, train, valid) for k in range(4)]


def test_ranks_read_what_one_process_reads(pool, corpus, tmp_path):
    """Rank 0 builds the indices, the others wait and read them."""
    both = pool.run(first_samples, corpus, str(tmp_path / "shared"), world_size=2)
    assert both[0] == both[1] == first_samples(corpus, str(tmp_path / "alone"))
    assert list((tmp_path / "shared").rglob("*-GPTDataset-train-document_index.npy"))


# ------------------------------------------------------------------ wrong settings


@pytest.mark.parametrize(
    ("data_path", "message"),
    [
        ([], "--data-path is empty"),
        (["0.5", "a", "b", "c"], r"--data-path 0\.5 a b c mixes weights and prefixes.*0\.3 first"),
        (["0.5", "a", "b"], "mixes weights and prefixes"),
        (["0", "a", "1", "b"], "mixes weights and prefixes"),
        (["nan", "a", "1", "b"], "a positive weight"),
    ],
)
def test_a_wrong_data_path(data_path, message):
    """megatron-core asserts with no text, or divides by zero."""
    with pytest.raises(HelixError, match=message):
        parse_data_path(data_path)


def test_a_data_path_is_megatrons():
    """One prefix, several, pairs."""
    assert parse_data_path(["a"]) == (["a"], None)
    assert parse_data_path(["a", "b"]) == (["a", "b"], None)
    assert parse_data_path(["2", "a", "1.5", "b"]) == (["a", "b"], [2.0, 1.5])


@pytest.mark.parametrize(
    ("num_samples", "changes", "message"),
    [
        (
            (1, 1, 0),
            {"split": "99,1"},
            "the valid part of .*corpus has 0 of its 40 documents with 0",
        ),
        (
            (0, 0, None),
            {"split": "39,0,1"},
            r"test part .* 1 of its 40 .* \d+ tokens, but needs at .* 501",
        ),
        ((1, 0, 0), {"split": "x"}, "--split 'x' is not a list of weights"),
        ((1, -1, 0), {}, "1, -1, 0 samples were asked for"),
        ((1, 0, 0), {"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_settings_that_cannot_work(corpus, num_samples, changes, message):
    """For an empty part megatron-core would count epochs of nothing for ever."""
    with pytest.raises(HelixError, match=message):
        build_megatron_datasets([corpus], ByteTokenizer(), 500, num_samples, **changes)


def test_weights_need_a_number_of_samples(corpus):
    """A weighted blend has no epoch."""
    with pytest.raises(HelixError, match="weights needs a number of samples for every split"):
        build(["1", corpus, "1", corpus], (None, 0, 0))


def test_a_cache_that_cannot_be_written(corpus, tmp_path):
    """The one fault that shows only while building; it names the flag."""
    (tmp_path / "file").touch()
    with pytest.raises(HelixError, match=r"cannot keep the indices .*--data-cache-path DIR"):
        build([corpus], data_cache_path=str(tmp_path / "file"))


# ------------------------------------------------------------------ wrong files


def test_a_good_dataset_is_summarised(corpus):
    """Lengths and totals equal what megatron-core reads."""
    summary = check_indexed_dataset(corpus, vocab_size=257)
    indexed = IndexedDataset(corpus)
    assert summary.lengths.tolist() == indexed.sequence_lengths.tolist()
    assert (summary.documents, summary.tokens) == (40, sum(map(len, DOCUMENTS)) + 40)
    assert summary.token_type == np.uint16


def test_missing_files(corpus, tmp_path):
    """Each way to miss has its own advice."""
    for prefix, message in (
        (
            tmp_path / "corpse",
            r"no dataset at the prefix .*corpse: .*idx does not exist.*there: .*corpus",
        ),
        (f"{corpus}.bin", r"takes the prefix without the suffix: .*corpus\.$"),
        (tmp_path / "no" / "where", r"Make one: scripts/preprocess_data\.py --input FILE"),
    ):
        with pytest.raises(HelixError, match=message):
            check_indexed_dataset(str(prefix))
    Path(f"{corpus}.bin").unlink()
    with pytest.raises(
        HelixError, match=r"corpus\.bin does not exist.*without its data: copy the .bin"
    ):
        check_indexed_dataset(corpus)


def header(**changes) -> bytes:
    """An index header of 3 sequences in 3 documents, changed."""
    fields = {"magic": b"MMIDIDX\0\0", "version": 1, "code": 8, "sequences": 3, "ends": 4} | changes
    return struct.pack("<9sQBQQ", *fields.values())


CORRUPT = {
    r"is not a Megatron index: it begins with b'plain tex', not b'MM": b"plain text, nothing else",
    r"is not a Megatron index: it begins with b'MMIDIDY": header(magic=b"MMIDIDY\0\0"),
    r"is truncated: 0 bytes, and the header alone takes 34": b"",
    r"is truncated: 20 bytes, and the header alone takes 34": header()[:20],
    r"has index version 2\. Valid: 1\.": header(version=2),
    r"has token type 6\. Valid: 1 \(uint8\), .*8 \(uint16\)": header(code=6),
    r"is truncated: 34 bytes, .*3 sequences and 4 document ends, which take 102": header(),
    r"is truncated: 34 bytes, .*9223372036854775808 sequences": header(sequences=2**63),
    r"is corrupt: 234 bytes, .* which take 102": header() + bytes(200),
    r"is corrupt: 70 bytes": header(ends=0) + bytes(36),
    r"holds no documents": header(sequences=0, ends=1) + bytes(8),
    r"is corrupt: its shortest sequence has 0 tokens, .* at sequence 0 of 3": header() + bytes(68),
    r"is corrupt: its shortest sequence has -1 tokens": (
        header() + struct.pack("<3i3q4q", 1, -1, 2, 0, 2, 0, 0, 1, 2, 3)
    ),
    r"holds no tokens: all of its 3": (
        header() + struct.pack("<3i3q4q", 0, 0, 0, 0, 0, 0, 0, 1, 2, 3)
    ),
    r"is corrupt: its last sequence of 3 tokens begins at byte 8 of 12": (
        header() + struct.pack("<3i3q4q", 1, 2, 3, 0, 2, 8, 0, 1, 2, 3)
    ),
}


@pytest.mark.parametrize("message", CORRUPT)
def test_a_corrupt_index(tmp_path, message):
    """What is wrong with it, in numbers."""
    (tmp_path / "x.idx").write_bytes(CORRUPT[message])
    (tmp_path / "x.bin").write_bytes(bytes(12))
    with pytest.raises(HelixError, match=message):
        check_indexed_dataset(str(tmp_path / "x"))


@pytest.mark.parametrize(("size", "word"), [(-1, "shorter"), (2, "longer")])
def test_data_that_does_not_fit_its_index(corpus, size, word):
    """An incomplete copy of the .bin would otherwise fail hours into training."""
    data = Path(f"{corpus}.bin").read_bytes()
    Path(f"{corpus}.bin").write_bytes(data[:size] if size < 0 else data + bytes(size))
    with pytest.raises(
        HelixError, match=rf"corpus\.bin is {word} than its index says: \d+ bytes, but"
    ):
        check_indexed_dataset(corpus)


def test_every_truncated_index_is_refused(corpus):
    """Wherever a copy stopped: never a crash, never a dataset."""
    index = Path(f"{corpus}.idx").read_bytes()
    for size in range(0, len(index), 64):
        Path(f"{corpus}.idx").write_bytes(index[:size])
        with pytest.raises(HelixError, match="is truncated"):
            check_indexed_dataset(corpus)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_to_the_index_is_refused_or_harmless(tmp_path_factory, data):
    """Random bytes at random places: an error, or the lengths are still what megatron-core reads."""
    directory = tmp_path_factory.getbasetemp() / "damage"
    if not directory.exists():
        directory.mkdir()
        write(directory / "whole", DOCUMENTS)
    index = bytearray((directory / "whole.idx").read_bytes())
    shutil.copy(directory / "whole.bin", directory / "x.bin")
    for _ in range(data.draw(st.integers(1, 3))):
        index[data.draw(st.integers(0, len(index) - 1))] = data.draw(st.integers(0, 255))
    (directory / "x.idx").write_bytes(index)
    try:
        summary = check_indexed_dataset(str(directory / "x"), vocab_size=257)
    except HelixError:
        return
    indexed = IndexedDataset(str(directory / "x"))
    assert indexed.sequence_lengths.tolist() == summary.lengths.tolist()
    assert indexed.index.dtype().itemsize == summary.token_type.itemsize


def test_a_dataset_of_another_tokenizer(tmp_path):
    """Ids above the vocabulary would read beyond the embedding table."""
    prefix = write(tmp_path / "x", [b"", b"abc"])
    assert check_indexed_dataset(prefix, vocab_size=257).tokens == 5
    message = "has token ids from 256 to 256, but the tokenizer has 100 tokens. Valid ids: 0 to 99"
    with pytest.raises(HelixError, match=message):
        check_indexed_dataset(prefix, vocab_size=100)


def test_documents_too_long_for_the_format(tmp_path, monkeypatch):
    """Lengths are int32; nothing may be left of the attempt."""
    monkeypatch.setattr("helix_megatron.data.indexed_files.MAX_DOCUMENT_TOKENS", 4)
    with pytest.raises(HelixError, match="a document has 5 tokens; the format's limit is 4"):
        write(tmp_path / "x", [b"abc", b"abcd"])
    assert list(tmp_path.iterdir()) == []


def test_the_datasets_warn_of_nothing(corpus, monkeypatch):
    """A warning for every build would teach users to overlook them."""
    monkeypatch.setenv("RANK", "0")  # as every run has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build([corpus])[0][0]
