"""`response_format`: whatever the model says, a text is JSON of the schema; its absence is refused in words."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from fake_engine import MODEL, FakeEngine, FakeTokens, serving

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import Request, Sampling
from helix_megatron.inference.sampler import Place, sample
from helix_megatron.inference.tokens import ByteTokens
from helix_megatron.serving.grammars import Grammars

ASK = [{"role": "user", "content": "who?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def is_person(value: Any) -> bool:
    """The schema, written out."""
    return (
        list(value) == ["name", "age", "kind"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and value["kind"] in ("cat", "dog")
    )


@pytest.mark.parametrize("vocabulary", [256, 257, 300])
@pytest.mark.parametrize("seed", range(4))
def test_random_logits_give_json(vocabulary, seed):
    """A model that knows nothing, with a token that ends a text or without, and more logits than tokens."""
    tokens = ByteTokens(min(vocabulary, 257))
    constraint = Grammars(tokens, vocabulary).constraint(PERSON)()
    generator = torch.Generator().manual_seed(seed)
    text: list[int] = []
    complete = False
    while not complete and len(text) < 500:
        logits = torch.randn(1, vocabulary, generator=generator)
        allowed = constraint.allowed(vocabulary)
        assert allowed.shape == (vocabulary,)
        place = Place(Sampling(seed=seed), len(text), text, allowed)
        (choice,) = sample(logits, [place])
        assert choice is not None and allowed[choice.token]
        text.append(choice.token)
        complete = constraint.accept(choice.token)
    assert complete, "the text ends with its last bracket"
    assert is_person(json.loads(bytes(text)))


def test_a_text_that_cannot_go_on_is_an_error():
    """A token that is not allowed, and a vocabulary without what the schema needs: both in words."""
    constraint = Grammars(ByteTokens(257), 257).constraint(PERSON)()
    with pytest.raises(HelixError, match="the text is no JSON of its schema"):
        constraint.accept(ord("x"))
    constraint = Grammars(ByteTokens(257), 257).constraint(PERSON)()
    with pytest.raises(HelixError, match="no token of the model continues it"):
        constraint.allowed(ord("{"))


def constrained(request: Request) -> Iterator[int]:
    """As the engine does: any token that is allowed, and the end when the text is complete."""
    source = random.Random(1)
    size = 257
    assert request.constraint is not None
    while True:
        token = source.choice(np.flatnonzero(request.constraint.allowed(size)).tolist())
        yield token
        if request.constraint.accept(token):
            yield 256


def test_a_client_gets_json():
    """OpenAI's own client, whole and in a stream; each choice has a constraint of its own."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    with serving(FakeEngine(script=constrained)) as served, served.openai() as client:
        asked = {"model": MODEL, "messages": ASK, "max_tokens": 500}
        answer = client.chat.completions.create(**asked, n=2, response_format=form)
        assert all(is_person(json.loads(one.message.content)) for one in answer.choices)
        stream = client.chat.completions.create(**asked, response_format=form, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert is_person(json.loads(text))
        answer = client.completions.create(
            model=MODEL, prompt="x", max_tokens=500, extra_body={"response_format": form}
        )
        assert is_person(json.loads(answer.choices[0].text))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"type": "json"}, "Input should be 'text', 'json_object' or 'json_schema'"),
        (
            {"type": "json_schema"},
            "json_schema with an object `schema` belongs to type json_schema",
        ),
        ({"type": "text", "json_schema": {"schema": {}}}, "and to no other"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}},
            "the schema of response_format cannot be used: Invalid type: strin",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "null"}}}},
            "the schema of response_format cannot be used",
        ),
        (  # llguidance 1.9.1 panics when it quotes this
            {"type": "json_schema", "json_schema": {"schema": {"minimum": "é" * 50}}},
            "the schema of response_format cannot be used",
        ),
    ],
)
def test_what_is_no_schema_is_refused(form, message):
    """Before anything is generated, with what is wrong."""
    with serving() as served, pytest.raises(openai.BadRequestError) as error:
        served.openai().chat.completions.create(model=MODEL, messages=ASK, response_format=form)
    assert message in str(error.value)


def test_without_the_library(monkeypatch):
    """A server that has not got it says so, and what to do."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(HelixError, match=r"needs llguidance.*pip install 'helix_megatron\[json\]'"):
        Grammars(FakeTokens(), 257).constraint(PERSON)
