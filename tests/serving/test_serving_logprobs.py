"""Log-probabilities, echoes and the best of several: what OpenAI's own client finds in the answers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import openai
import pytest
from fake_engine import MODEL, FakeEngine, Served, logprobs, serving

from helix_megatron.inference.request import Request
from helix_megatron.inference.tokens import FileTokens

ASK = [{"role": "user", "content": "hey"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return served.openai()


def value(character: str) -> float:
    """What the fake engine says of a token."""
    return logprobs(ord(character), 0).logprob


def test_completion(client):
    """One entry for each token; its own number is among the likeliest ones, too; offsets count characters."""
    answer = client.completions.create(model=MODEL, prompt="xyz", max_tokens=4, logprobs=2)
    found = answer.choices[0].logprobs
    assert found.tokens == ["x", "y", "z", "x"]
    assert found.token_logprobs == [value(c) for c in "xyzx"]
    assert found.text_offset == [0, 1, 2, 3]
    assert found.top_logprobs[1] == {c: value(c) for c in "aby"}
    plain = client.completions.create(model=MODEL, prompt="xyz", max_tokens=4)
    assert plain.choices[0].logprobs is None


def test_echo(client):
    """The prompt comes first, as text and as tokens, whose first one has no number."""
    asked = {"model": MODEL, "prompt": ["xyz", "é"], "max_tokens": 2, "echo": True}
    first, second = client.completions.create(**asked, logprobs=0).choices
    assert (first.text, second.text) == ("xyzxy", "éé")
    assert first.logprobs.tokens == [*"xyzxy"]
    assert first.logprobs.token_logprobs == [None, *map(value, "yzxy")]
    assert first.logprobs.top_logprobs == [None, *({c: value(c)} for c in "yzxy")]
    assert second.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9"] * 2
    lengths = map(len, second.logprobs.tokens)
    assert second.logprobs.text_offset == [0, *accumulate(lengths)][:-1]
    tokens = client.completions.create(**asked | {"prompt": [104, 105]})
    assert (tokens.choices[0].text, tokens.choices[0].logprobs) == ("hihi", None)


def test_chat(client):
    """With the bytes of each token, and as many alternatives as were asked for."""
    asked = {"model": MODEL, "messages": ASK, "max_tokens": 3, "logprobs": True}
    (choice,) = client.chat.completions.create(**asked, top_logprobs=2).choices
    assert [one.token for one in choice.logprobs.content] == [*"hey"]
    assert [one.bytes for one in choice.logprobs.content] == [[ord(c)] for c in "hey"]
    assert [one.logprob for one in choice.logprobs.content] == [value(c) for c in "hey"]
    tops = [[other.token for other in one.top_logprobs] for one in choice.logprobs.content]
    assert tops == [["a", "b"]] * 3
    (choice,) = client.chat.completions.create(**asked).choices
    assert [one.top_logprobs for one in choice.logprobs.content] == [[]] * 3


def test_streams_say_the_same(client):
    """The events' entries together are those of the whole answer, offsets included."""
    asked = {"model": MODEL, "prompt": "xyz", "max_tokens": 20, "logprobs": 1, "echo": True}
    whole = client.completions.create(**asked).choices[0].logprobs
    parts = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(part.text for part in parts) == ("xyz" * 8)[:23]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        found = [one for part in parts for one in getattr(part.logprobs, name)]
        assert found == getattr(whole, name)
    chat = {"model": MODEL, "messages": ASK, "max_tokens": 9, "logprobs": True, "stream": True}
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**chat)]
    found = [one.token for part in parts if part.logprobs for one in part.logprobs.content]
    assert "".join(found) == "hey" * 3


def test_a_stop_token_has_no_entry(client):
    """It is no part of the text."""
    answer = client.completions.create(model=MODEL, prompt=[104, 256], max_tokens=9, logprobs=0)
    assert (answer.choices[0].text, answer.choices[0].logprobs.tokens) == ("h", ["h"])


def test_the_best_of_several():
    """Of each prompt's candidates those whose tokens are likeliest on average; all count in the usage."""
    begun: dict[tuple[int, ...], int] = {}

    def later_are_likelier(request: Request) -> Iterator[int]:
        begun[request.prompt] = begun.get(request.prompt, 0) + 1
        letter = ord("z") - begun[request.prompt]
        while True:
            yield letter

    with serving(FakeEngine(script=later_are_likelier)) as served:
        answer = served.openai().completions.create(
            model=MODEL, prompt=["a", "b"], max_tokens=3, n=2, best_of=4
        )
        samplings = [request.sampling for request in served.engine.submitted]
    assert [choice.text for choice in answer.choices] == ["vvv", "www"] * 2
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 24)
    assert {one.logprobs for one in samplings} == {0}


def test_usage_tells_what_was_not_computed(client):
    """Once for each prompt, as the prompt's tokens themselves."""
    answer = client.completions.create(model=MODEL, prompt=["x" * 9, "y" * 8], n=2, max_tokens=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 9 // 4 + 8 // 4


def test_what_the_engine_is_asked(served, client):
    """Every field arrives; what is left out, and null, changes nothing."""
    before = len(served.engine.submitted)
    fields = {"presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"65": -100, "7": 2}}
    more = {"repetition_penalty": 1.2, "min_p": 0.1}
    asked = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    client.completions.create(**asked, **fields, extra_body=more)
    client.completions.create(**asked, extra_body=dict.fromkeys([*fields, *more]))
    first, second = (request.sampling for request in served.engine.submitted[before:])
    assert (first.presence_penalty, first.frequency_penalty) == (0.5, -1)
    assert (first.repetition_penalty, first.min_p) == (1.2, 0.1)
    assert first.logit_bias == ((7, 2), (65, -100))
    assert (second.changes_logits, second.min_p, second.logprobs) == (False, 0, None)


def test_texts_and_tokens(served):
    """There and back; a conversation as its template writes it."""
    http = served.http()
    found = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert found == {
        "count": 3,
        "max_model_len": 2048,
        "tokens": [*"hé".encode()],
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9"],
    }
    back = http.post("/detokenize", json={"model": MODEL, "tokens": found["tokens"]}).json()
    assert back == {"prompt": "hé"}
    found = http.post("/tokenize", json={"messages": ASK}).json()
    assert found == {"count": 3, "max_model_len": 2048, "tokens": [*b"hey"]}


def test_texts_of_single_tokens(tmp_path):
    """Of a vocabulary of bytes: with the space in front, with the bytes of a part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*alphabet, "\u0120a"])}
    backend = Tokenizer(models.BPE(vocabulary, [("\u0120", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokens = FileTokens(tmp_path / "tokenizer.json")
    ids = [*tokens.encode(" aé"), len(vocabulary)]
    assert [tokens.token_text(one) for one in ids] == [
        (" a", b" a"),
        ("bytes:\\xc3", b"\xc3"),
        ("bytes:\\xa9", b"\xa9"),
        ("<end>", None),
    ]
    assert tokens.token_text(len(vocabulary) + 5) == ("", None)
