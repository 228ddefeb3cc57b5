"""Text becomes the tokens that the model knows, and tokens become text as soon as it is certain."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import sized
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from waiting import LIMIT, wait_until

from helix_megatron.data.text import default_text
from helix_megatron.errors import HelixError
from helix_megatron.inference.arguments import InferenceConfig
from helix_megatron.inference.templates import ChatTemplate
from helix_megatron.inference.token_streams import TokenStream
from helix_megatron.inference.tokens import (
    ByteTokens,
    FileTokens,
    HuggingFaceTokens,
    configured_stops,
    open_tokens,
)
from helix_megatron.model.description import ModelConfig
from helix_megatron.run.config import RunConfig

CORPUS = [default_text()[:20_000].decode(), "naïve café – 日本語 😀 Ωμέγα ", "a b  c\n\n\td"]
SPECIAL = ["<s>", "</s>", "<|turn|>"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<|turn|>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
)


@functools.cache
def backend(kind: str) -> Tokenizer:
    """Trained on a small text, with a token in front and one at the end of every text."""
    if kind == "byte-level BPE":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "Metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    else:  # as SentencePiece makes it for Llama 2: characters that it does not know are bytes
        tokenizer = Tokenizer(models.BPE(unk_token="<s>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        fallback = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*SPECIAL, *fallback], show_progress=False
        )
    tokenizer.train_from_iterator(CORPUS[:1] if kind == "byte fallback" else CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    if kind == "byte fallback":  # pieces of the vocabulary, not special tokens
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer


KINDS = ("byte-level BPE", "Metaspace", "byte fallback")


def save(kind: str, directory: Path, template: str | None = TEMPLATE) -> Path:
    """As a model's directory has it."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend(kind), bos_token="<s>", eos_token="</s>"
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(directory)
    return directory


def config(load: Path, vocab_size: int = 1000, **others: Any) -> InferenceConfig:
    run = RunConfig(ModelConfig(vocab_size=vocab_size), 1)
    return InferenceConfig(run, "fp32", str(load), **{"load_kind": "canonical"} | others)


# -------------------------------------------------------------------------- streams


def streamed(stream: Any, parts: list[list[int]]) -> str:
    texts = [stream.add(part) for part in parts]
    return "".join(texts) + stream.finish()


def split(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    places = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    return [tokens[a:b] for a, b in itertools.pairwise(places)]


PIECES = st.sampled_from([*"ab 😀é日�Ωñ.,'\n", "the ", " of", "  ", " 日本", "😀😀"])
TEXTS = st.lists(PIECES | st.characters(codec="utf-8"), max_size=25).map("".join)
CUTS = st.lists(st.integers(0, 200), max_size=12)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, cuts=CUTS)
@settings(max_examples=sized("inference", full=60, quick=20), deadline=None)
def test_text_does_not_depend_on_the_split(kind, text, cuts):
    """The oracle decodes all tokens at once."""
    tokenizer = backend(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    if kind == "byte-level BPE":
        assert whole == text
    assert streamed(TokenStream(tokenizer.decode), split(ids, cuts)) == whole
    # After a prompt: what the output adds to it, so that a word keeps the space in front of it.
    place = (sum(cuts) + len(text)) % (len(ids) + 1)
    if not tokenizer.decode(ids[:place]).endswith("�"):
        stream = TokenStream(tokenizer.decode, ids[:place])
        assert tokenizer.decode(ids[:place]) + streamed(stream, split(ids[place:], cuts)) == whole


@pytest.mark.parametrize("kind", ["byte-level BPE", "Metaspace"])
@given(ids=st.lists(st.integers(0, 550), max_size=25), cuts=CUTS)
@settings(max_examples=sized("inference", full=60, quick=20), deadline=None)
def test_any_tokens_at_all(kind, ids, cuts):
    """A model need not write valid UTF-8: random tokens, special ones among them."""
    tokenizer = backend(kind)
    assert streamed(TokenStream(tokenizer.decode), split(ids, cuts)) == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 300), max_size=25), CUTS)
@settings(max_examples=sized("inference", full=60, quick=20), deadline=None)
def test_any_bytes_at_all(ids, cuts):
    """The same for bytes; half a character is never shown, and tokens that are none add nothing."""
    whole = bytes(token for token in ids if token < 256).decode(errors="replace")
    assert streamed(ByteTokens().decoder(), split(ids, cuts)) == whole


def test_text_comes_as_soon_as_it_is_certain():
    """Characters of four bytes: nothing three times, then the character; nothing is held back longer."""
    tokens = ByteTokens()
    stream = tokens.decoder()
    assert [stream.add([byte]) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    tokenizer = backend("byte fallback")
    ids = tokenizer.encode("a 😀b", add_special_tokens=False).ids
    stream = TokenStream(tokenizer.decode)
    assert [stream.add([one]) for one in ids][-5:] == ["", "", "", "😀", "b"]
    stream = TokenStream(tokenizer.decode)
    assert stream.add(ids[:-2]) == "a " and stream.finish() == "���" and stream.finish() == ""


def test_a_valid_character_stays_where_a_later_byte_is_not():
    """The byte-fallback decoder gives up the whole run of bytes; what was shown cannot be taken back."""
    tokenizer = backend("byte fallback")
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in b"\xc3\xa9\xff"]
    assert tokenizer.decode(ids) == "���"
    text = streamed(TokenStream(tokenizer.decode), [[one] for one in ids])
    assert text == streamed(TokenStream(tokenizer.decode), [ids])
    assert text[0] == "é" and set(text[1:]) == {"�"}


# -------------------------------------------------------------------------- tokenizers


def test_a_model_directory_brings_its_tokenizer(tmp_path, monkeypatch):
    """Front tokens, stop tokens and template as the files say; no network, not even a question."""
    save("byte-level BPE", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 9]}')

    def refuse(*args: object) -> None:
        raise AssertionError("a connection to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokens = open_tokens(config(tmp_path, load_kind="huggingface"))
    assert isinstance(tokens, HuggingFaceTokens)
    own = backend("byte-level BPE")
    assert tokens.vocab_size == own.get_vocab_size()
    assert tokens.stop_tokens == {1, 7, 9}
    (tmp_path / "config.json").write_text('{"eos_token_id": null}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert configured_stops(tmp_path) == {0}
    plain = own.encode("naïve 日", add_special_tokens=False).ids
    assert tokens.encode("naïve 日") == [0, *plain], "in front yes, an end of the text no"
    assert tokens.encode("") == [0]
    assert streamed(tokens.decoder(), [[*plain, 2], [1]]) == "naïve 日", (
        "special tokens are not text"
    )
    messages = [{"role": "user", "content": "hi"}]
    monkeypatch.undo()  # the template has a process of its own, and that is reached without the network, too
    chat = tokens.encode(tokens.chat_text(messages), begin=False)
    assert chat == tokens._tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert own.decode(chat, skip_special_tokens=False) == "<|turn|>user: hi\n<|turn|>assistant:"
    with pytest.raises(HelixError, match=r"refuses these messages: no system"):
        tokens.chat_text([{"role": "system", "content": "hi"}])
    with pytest.raises(HelixError, match="half of a surrogate pair"):
        tokens.encode("a\ud800")
    with pytest.raises(HelixError, match="half of a surrogate pair"):
        tokens.encode(tokens.chat_text([{"role": "user", "content": "a\ud800"}]))
    tokens.close()


def test_a_converted_checkpoint_has_it_in_a_folder_of_its_own(tmp_path):
    """`helix convert` keeps what came with a Hugging Face model beside the tensors."""
    save("Metaspace", tmp_path / "huggingface", template=None)
    tokens = open_tokens(config(tmp_path))
    assert streamed(tokens.decoder(), [tokens.encode("a café")]) == "a café"
    output = tokens.encode("a café")[2:]
    assert streamed(tokens.decoder(), [output]) == "café"
    assert streamed(tokens.decoder(tokens.encode("a")), [output]) == " café"
    with pytest.raises(HelixError, match=r"no chat template.*--tokenizer DIR"):
        tokens.chat_text([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("name", ["tokenizer.json", "."])
def test_a_file_by_its_name(tmp_path, name):
    """`--tokenizer FILE`, or a directory with nothing else: the stop token is known by its usual name."""
    backend("Metaspace").save(str(tmp_path / "tokenizer.json"))
    tokens = open_tokens(config(tmp_path / "model", tokenizer=str(tmp_path / name)))
    assert isinstance(tokens, FileTokens)
    assert tokens.stop_tokens == {1}
    assert tokens.encode("a b")[0] == 0 and tokens.encode("a b")[-1] != 1
    assert streamed(tokens.decoder(), [tokens.encode("a b"), [1]]) == "a b"
    with pytest.raises(HelixError, match=r"a tokenizer.json alone has no chat template"):
        tokens.chat_text([])


def test_a_model_of_bytes_needs_no_tokenizer(tmp_path):
    """What scripts/pretrain_gpt.py trains without --tokenizer-model must generate text right away."""
    notes: list[str] = []
    tokens = open_tokens(config(tmp_path, 256), notes.append)
    assert isinstance(tokens, ByteTokens)
    assert notes == ["The model has 256 tokens and no tokenizer: every byte is a token."]
    assert (tokens.vocab_size, tokens.stop_tokens) == (256, frozenset())
    assert tokens.encode("aé") == [97, 195, 169]
    assert tokens.encode(b"a\xff".decode(errors="surrogateescape")) == [97, 255]
    with pytest.raises(HelixError, match="half of a surrogate pair"):
        tokens.encode("\ud800")
    with pytest.raises(HelixError, match="a model of bytes has no chat template"):
        tokens.chat_text([])
    documents = open_tokens(config(tmp_path, 257), notes.append)
    assert "token 256 ends a document" in notes[-1]
    assert (documents.vocab_size, documents.stop_tokens) == (257, {256})
    assert streamed(documents.decoder(), [[97, 256]]) == "a"
    assert open_tokens(config(tmp_path, 50_000, tokenizer="byte")).vocab_size == 257


def broken(folder: Path) -> Path:
    (folder / "tokenizer.json").write_text("{}")
    return folder


def with_code(folder: Path) -> Path:
    save("Metaspace", folder)
    path = folder / "tokenizer_config.json"
    map_ = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | map_))
    (folder / "tokenizer.json").unlink()
    (folder / "own.py").write_text("raise SystemExit('code was run')\n")
    return folder


@pytest.mark.parametrize(
    ("make", "settings_", "text"),
    [
        (lambda f: f, {}, r"no tokenizer lies with .* has 1000 tokens\. Give --tokenizer DIR"),
        (lambda f: f, {"vocab_size": 256, "load_kind": "huggingface"}, "no tokenizer lies with"),
        (lambda f: f, {"tokenizer": "nowhere"}, r"--tokenizer nowhere does not exist\. Give"),
        (lambda f: f, {"tokenizer": "."}, r"\. has no tokenizer \(tokenizer.json, "),
        (
            lambda f: f,
            {"tokenizer": "byte", "vocab_size": 100},
            "has 256 tokens, and the model knows",
        ),
        (broken, {}, "is not a tokenizer file of the tokenizers library"),
        (with_code, {}, r"the tokenizer in .* cannot be read: "),
    ],
)
def test_what_is_missing_is_told(tmp_path, monkeypatch, make, settings_, text):
    """Wrong words would come out of a wrong tokenizer, so none is guessed; and no code is run."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises(HelixError, match=text):
        open_tokens(config(tmp_path, **settings_))


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"],
)
def test_a_tokenizer_with_a_pipe_in_it(tmp_path, name):
    """The library would wait for its writer."""
    save("Metaspace", tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(HelixError, match=rf"{name} is no file"):
        HuggingFaceTokens(tmp_path)
    if name == "tokenizer.json":
        with pytest.raises(HelixError, match=rf"{name} is no file"):
            FileTokens(tmp_path / name)


def _unknown_token_in_front(path: Path) -> None:
    content = json.loads((path / "tokenizer.json").read_text())
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<nowhere>"
    (path / "tokenizer.json").write_text(json.dumps(content))


def _no_number_as_length(path: Path) -> None:
    content = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(content | {"model_max_length": [1]}))


@pytest.mark.parametrize("change", [_unknown_token_in_front, _no_number_as_length])
def test_a_tokenizer_that_fails_when_it_is_used(tmp_path, change):
    """It is found when it is opened: the library panics, or compares a list with a number."""
    save("Metaspace", tmp_path)
    change(tmp_path)
    with pytest.raises(HelixError, match="cannot be read"):
        HuggingFaceTokens(tmp_path)
    if change is _unknown_token_in_front:
        with pytest.raises(HelixError, match="is not a tokenizer file"):
            FileTokens(tmp_path / "tokenizer.json")


def test_another_models_tokenizer(tmp_path):
    """It would ask for tokens that the model does not have."""
    save("Metaspace", tmp_path)
    size = backend("Metaspace").get_vocab_size()
    with pytest.raises(HelixError, match=rf"has {size} tokens, and the model knows 300"):
        open_tokens(config(tmp_path / "model", 300, tokenizer=str(tmp_path)))


def test_the_libraries_are_asked_for_by_name(tmp_path, monkeypatch):
    """Neither is a dependency of the package."""
    backend("Metaspace").save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(HelixError, match="pip install tokenizers, or --tokenizer byte"):
        FileTokens(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        HelixError, match=r"pip install transformers, or give --tokenizer tokenizer.json"
    ):
        HuggingFaceTokens(tmp_path)


# -------------------------------------------------------------------------- chat templates

FULL = pytest.mark.full("inference")
CHAT = "{{ bos }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "program",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        pytest.param("{% set x = 'x' * 10 ** 10 %}", marks=FULL),
        "{{ messages[0].role * 10 ** 8 }}",
        pytest.param(
            "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            marks=FULL,
        ),
        pytest.param("{{ (messages | length * 10) ** (10 ** 8) }}", marks=FULL),
    ],
)
def test_a_template_that_takes_too_much_is_ended(program):
    """Time, memory or text: a server goes on, and the next conversation finds a new process."""
    text = "{% if messages[0].content == 'bad' %}" + program + "{% endif %}" + CHAT
    template = ChatTemplate(text, {"bos": "<s>"}, seconds=0.5)
    for _ in range(2):
        with pytest.raises(
            HelixError, match=r"chat template (did not end within 5 s|refuses these)"
        ):
            template.render([{"role": "user", "content": "bad"}])
        assert template.render([{"role": "user", "content": "good"}]) == "<s>good"
    template.close()


def test_a_template_is_ended_with_the_server():
    """A thread may wait for it: what ends the server must not wait for that thread."""
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(loop, {}, seconds=LIMIT)
    with ThreadPoolExecutor() as threads:
        rendering = threads.submit(template.render, [{"role": "user", "content": "x"}])
        wait_until(lambda: template._process, "the process is there")
        template.close()
        with pytest.raises(HelixError):
            rendering.result(LIMIT)


@pytest.mark.parametrize("make", [FileTokens, HuggingFaceTokens])
def test_others_go_on_while_a_long_text_is_tokenised(tmp_path, make):
    """The library holds Python's lock in some of its calls: then no event loop would answer."""
    save("byte-level BPE", tmp_path)
    tokens = make(tmp_path / "tokenizer.json" if make is FileTokens else tmp_path)
    text = "".join(chr(65 + place * place % 57) for place in range(400_000))
    seen = 0
    with ThreadPoolExecutor() as threads:
        work = threads.submit(tokens.encode, text)
        while not work.done():
            seen += 1
            time.sleep(0.001)
    assert seen > 20
