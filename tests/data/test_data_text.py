"""Text without a tokenizer, and who trains on which sample of it."""

from __future__ import annotations

import gzip
import itertools
import pydoc_data.topics
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from test_preprocess import SENTENCE, text_of, train_bpe
from tokenizers import Tokenizer

from helix_megatron.data.batches import KEYS, micro_batches
from helix_megatron.data.text import (
    ByteDataset,
    HuggingFaceTokenizer,
    build_tokenizer,
    default_text,
    parse_split,
    read_text,
    split_bounds,
    split_text,
)
from helix_megatron.errors import HelixError

TEXT = bytes(range(256)) * 4
WEIGHT = st.integers(0, 1000) | st.floats(0, 10).map(lambda weight: round(weight, 3))
SPLIT = st.lists(WEIGHT, min_size=1, max_size=3).filter(any)


# ------------------------------------------------------------------ text


def test_default_text_is_the_reference_in_an_order_of_its_own(monkeypatch):
    """Python may list the topics in another order; two machines must still train on the same bytes."""
    text = default_text()
    topics = pydoc_data.topics.topics
    monkeypatch.setattr(pydoc_data.topics, "topics", dict(reversed(topics.items())))
    assert default_text() == text
    assert text.startswith(topics[min(topics)].encode())
    assert text.endswith(topics[max(topics)].encode())
    assert all(topic.encode() in text for topic in topics.values())
    assert len(text) > 300_000


def test_a_python_without_the_reference_is_told_what_to_do(monkeypatch):
    """Some distributions package `pydoc_data` apart."""
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(HelixError, match=r"lacks the module pydoc_data\.topics.*--text FILE"):
        default_text()


def test_files_are_joined_in_the_order_given(tmp_path):
    """Bytes stay as they are, be they UTF-8 or not."""
    (tmp_path / "a").write_bytes(b"first \xff")
    (tmp_path / "b").write_bytes(b"second\r\n")
    assert read_text([tmp_path / "b", str(tmp_path / "a")]) == b"second\r\n\n\nfirst \xff"
    (tmp_path / "a").write_bytes(gzip.compress(b"\xef\xbb\xbffirst"))
    assert read_text([tmp_path / "a"]) == b"first", "neither a mark nor compressed bytes are text"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no text file is named"),
        (
            ["full", "missing"],
            r"cannot read the text file .*missing: No such file.*leave --text out",
        ),
        (["."], r"is a directory\. Name its files, for example --text .*/\*\.txt"),
        (["empty"], "the text is empty: .*empty has 0 bytes"),
        (["empty", "empty"], "the text is empty: .*empty, .*empty has 0 bytes"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, names, message):
    """A wrong file name is found before anything starts, and named."""
    (tmp_path / "full").write_text("text")
    (tmp_path / "empty").touch()
    with pytest.raises(HelixError, match=message):
        read_text([tmp_path / name for name in names])


# ------------------------------------------------------------------ split


@given(SPLIT, st.integers(0, 100_000))
@settings(deadline=None)
def test_split_means_what_megatron_means(weights, size):
    """The same `--split` must cut a text and a Megatron dataset at the same place."""
    split = ",".join(map(str, weights))
    shares = parse_and_normalize_split(split)
    assert parse_split(split) == pytest.approx(shares, abs=1e-15)
    bounds = split_bounds(split, size)
    for part, share in enumerate(convert_split_vector_to_split_matrix(shares)):
        if share is None:
            assert bounds[part] == bounds[part + 1]
        else:
            expected = tuple(int(round(end * float(size))) for end in share)  # noqa: RUF046
            assert bounds[part : part + 2] == expected


@given(st.binary(max_size=300), SPLIT)
@settings(deadline=None)
def test_split_loses_nothing(text, weights):
    """Train, valid and test are disjoint and together the whole text."""
    assert b"".join(split_text(text, ",".join(map(str, weights)))) == text


@pytest.mark.parametrize(
    "split", ["", "a", "0,0,0", "1,2,3,4", "-1,2", "nan,1", "inf", "9" * 400, "1,,1", "1e3,1"]
)
def test_a_wrong_split_is_refused(split):
    """Megatron's own parser takes `-1` for `1` and divides by zero for `0,0,0`."""
    with pytest.raises(HelixError, match=r"--split .* is not a list of weights.*969,30,1"):
        parse_split(split)


# ------------------------------------------------------------------ dataset


def test_samples_are_shaped_as_megatrons():
    """Labels are the tokens one on; the dtypes are those of `GPTDataset`."""
    sample = ByteDataset(TEXT, 7, seed=3)[5]
    assert tuple(sample) == KEYS
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "tokens": (torch.int64, (7,)),
        "labels": (torch.int64, (7,)),
        "loss_mask": (torch.float32, (7,)),
        "position_ids": (torch.int64, (7,)),
    }
    start = int(sample["tokens"][0])
    assert sample["tokens"].tolist() == [(start + i) % 256 for i in range(7)]
    assert sample["labels"].tolist() == [(start + i + 1) % 256 for i in range(7)]
    assert sample["position_ids"].tolist() == list(range(7))
    assert sample["loss_mask"].tolist() == [1.0] * 7


@given(st.integers(2, 400), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_has_every_window_once(size, sequence_length, seed, epoch):
    """Whatever the lengths, an epoch's labels are the text without its first byte and its rest."""
    assume(size > sequence_length)
    text = np.random.RandomState(size).randint(0, 256, size, dtype=np.uint8).tobytes()
    dataset = ByteDataset(text, sequence_length, seed)
    samples = [dataset[epoch * len(dataset) + k] for k in range(len(dataset))]
    seen = sorted((bytes(s["tokens"].tolist()), bytes(s["labels"].tolist())) for s in samples)
    starts = range(0, len(dataset) * sequence_length, sequence_length)
    windows = [text[start : start + sequence_length + 1] for start in starts]
    assert seen == sorted((window[:-1], window[1:]) for window in windows)
    assert size - 1 - len(dataset) * sequence_length < sequence_length


def test_the_order_depends_on_seed_and_index_only():
    """A resumed run reads samples out of order and must find the same ones."""

    def firsts(dataset, indices):
        return {k: int(dataset[k]["tokens"][0]) for k in indices}

    indices = range(200)
    forward = firsts(ByteDataset(TEXT, 16, seed=1), indices)
    assert firsts(ByteDataset(TEXT, 16, seed=1), reversed(indices)) == forward
    assert firsts(ByteDataset(TEXT, 16, seed=2), indices) != forward
    epoch = len(ByteDataset(TEXT, 16, seed=1))
    assert [forward[k] for k in range(epoch)] != [forward[k + epoch] for k in range(epoch)]


def test_the_order_is_frozen():
    """A checkpoint's consumed samples mean the same with every later version of numpy."""
    dataset = ByteDataset(bytes(range(8)), 1, seed=1234)
    order = [int(dataset[k]["tokens"]) for k in range(14)]
    assert order == [4, 5, 3, 1, 2, 0, 6, 4, 3, 1, 5, 2, 0, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((b"", 8, 0), "the text has 0 bytes, too few for sequence length 8: a sample takes 9"),
        ((b"12345678", 8, 0), "has 8 bytes.*takes 9.*or a sequence length of at most 7"),
        ((b"text", 0, 0), "sequence length 0 is not positive"),
        ((b"text", 1, -1), r"seed -1 is out of range\. Valid seeds: 0 to 4294967295"),
        ((b"t", 1, 0, "the valid part"), "the valid part has 1 bytes, too few.*--split"),
    ],
)
def test_a_dataset_that_cannot_be(arguments, message):
    """The numbers are in the message."""
    with pytest.raises(HelixError, match=message):
        ByteDataset(*arguments)


# ------------------------------------------------------------------ tokenizers


def test_truncation_and_padding_in_a_tokenizer_file_are_ignored(tmp_path):
    """A file saved for inference may cut every text at 512 tokens: documents would be lost silently."""
    path = train_bpe(tmp_path / "tokenizer.json", "</s>", "<pad>")
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(2)
    backend.enable_padding(length=1000)
    backend.save(str(path))
    tokenizer = HuggingFaceTokenizer(str(tmp_path))
    text = SENTENCE
    (ids,) = tokenizer.tokenize_batch([text.encode()])
    assert text_of(ids, tokenizer) == text
    assert text_of([tokenizer.eod], tokenizer) == "</s>"
    assert tokenizer.vocab_size == len(tokenizer.vocab)


def test_an_end_of_document_token_by_name(tmp_path):
    """A tokenizer file does not say which token ends a document."""
    path = str(train_bpe(tmp_path / "tokenizer.json", "<unk>", "<stop>"))
    with pytest.raises(
        HelixError, match=r"has no end-of-document token.*special tokens are: <unk>, <s"
    ):
        HuggingFaceTokenizer(path)
    with pytest.raises(HelixError, match=r"lacks '<halt>'"):
        HuggingFaceTokenizer(path, "<halt>")
    assert HuggingFaceTokenizer(path, "<stop>").eod == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("GPT2BPETokenizer",), r"GPT2BPETokenizer is unknown\. Valid: byte, HuggingFaceTokenizer"),
        (("HuggingFaceTokenizer",), "needs --tokenizer-model FILE"),
        (("byte", "x.json"), "--tokenizer-type byte has a fixed vocabulary of 257"),
        ((None, "missing.json"), r"the tokenizer file missing\.json does not exist"),
        ((None, __file__), "is not a tokenizer file of the tokenizers library"),
    ],
)
def test_a_wrong_tokenizer(arguments, message):
    """Found when it is named, not when it is first used."""
    with pytest.raises(HelixError, match=message):
        build_tokenizer(*arguments)


# ------------------------------------------------------------------ micro-batches


class Numbers:
    """A dataset whose sample k holds k alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= self.length:
            raise IndexError
        return {key: torch.tensor([index]) for key in KEYS}


def take(batches, number):
    """The sample numbers of the next micro-batches, [number][micro-batch size]."""
    return [batch["tokens"][:, 0].tolist() for batch in itertools.islice(batches, number)]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_iteration_k_has_the_same_samples_on_any_number_of_ranks(b, ranks, steps, consumed):
    """k·G + i·b·D + d·b + [0, b): Megatron's order, so a run may go on with other ranks."""
    global_batch = b * ranks * steps
    for k in range(2):
        seen = set()
        for d in range(ranks):
            batches = micro_batches(Numbers(1000), b, d, ranks, consumed_samples=consumed)
            mine = take(batches, 2 * steps)[k * steps : (k + 1) * steps]
            first = consumed + k * global_batch + d * b
            expected = [
                [first + i * b * ranks + sample for sample in range(b)] for i in range(steps)
            ]
            assert mine == expected
            seen |= set(itertools.chain(*mine))
        assert seen == set(range(consumed + k * global_batch, consumed + (k + 1) * global_batch))


def test_collated_batches_have_the_keys_alone():
    """A blend adds the number of the dataset to every sample; the model does not want it."""

    class Blend(Numbers):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"dataset_id": torch.tensor(0)} | super().__getitem__(index)

    batch = next(micro_batches(Blend(10), 2, 0, 1))
    assert tuple(batch) == KEYS
    assert batch["tokens"].tolist() == [[0], [1]]


def test_consumed_samples_resume():
    """Iterations after a restart equal those of a run that was never stopped."""
    whole = take(micro_batches(Numbers(100), 2, 1, 2), 6)
    assert take(micro_batches(Numbers(100), 2, 1, 2, consumed_samples=16), 2) == whole[4:]


def test_an_exhausted_dataset_says_so():
    """Not an IndexError from the middle of numpy."""
    batches = micro_batches(Numbers(6), 2, 0, 1)
    assert take(batches, 3) == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(HelixError, match="has 6 samples and is exhausted: sample 6 was asked for"):
        next(batches)


def test_a_fault_inside_the_dataset_is_not_called_exhaustion():
    """An IndexError below the length is a defect and keeps its traceback."""

    class Broken(Numbers):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return [][index]

    with pytest.raises(IndexError):
        next(micro_batches(Broken(6), 2, 0, 1))
