"""Thousands of random bodies, and whatever the published schema permits: never a 5xx, always the shape.

The engine behind is a fake, so a 5xx can only be the server's own mistake.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import dataclasses
import json
import random
from typing import Any

import pytest
import schemathesis
from fake_engine import CAPACITY, MODEL, FakeEngine, FakeTokens, post
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiers import sized
from waiting import LIMIT

from helix_megatron.serving.app import make_app
from helix_megatron.serving.replies import ChatReply, CompletionReply, ErrorReply
from helix_megatron.serving.settings import ServerSettings

BODIES = sized("serving", full=10_000, quick=1_000)
PATHS = ("/v1/completions", "/v1/chat/completions")
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi."}]},
    ],
    "max_completion_tokens": 3,
}
COMPLETION = {"model": MODEL, "prompt": "Once upon", "max_tokens": 3, "temperature": 0.5}
OPTIONS: list[dict[str, Any]] = [
    {"n": 2},
    {"stop": ["e", "up"]},
    {"seed": 5},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"top_p": 0.5, "top_k": 3},
    {"ignore_eos": True},
    {"user": "me", "metadata": {}},
    {"logit_bias": {}, "presence_penalty": 0},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
    {"logit_bias": {"5": -3.5}, "frequency_penalty": 1.5, "repetition_penalty": 1.1, "min_p": 0.1},
]
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 0.5, 1e308, -0.0, 2**31, 2**63, 2**64, -(2**63), 10**40),
    *("", "x", "\x00", "\ud83d\ude00", "é" * 50, "\u202e", "x" * 3000, MODEL, "user"),
    *([], [[]], [[[]]], [None], [1], [300], [-1], [[1], "x"], ["a", "b"], [1.5], [True], [{}]),
    *({}, {"type": "text"}, {"": 0}, {"include_usage": 1}, {"role": "user", "content": None}),
    *([{"role": "user", "content": "x"}], [{"role": "user", "content": [{"type": "text"}]}]),
]
RAW = [
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'"\\ud800"',
    b"\xff",
    b"[" * 500,
    b"{",
    b"\x00",
]


def make_fuzzed() -> FastAPI:
    capacity = dataclasses.replace(CAPACITY, max_context=64)
    return make_app(
        FakeEngine(capacity), FakeTokens(), ServerSettings(MODEL, max_body_bytes=20_000)
    )


def check(path: str, status: int, body: bytes) -> int:
    """The response has the shape that its status promises; its status."""
    assert status < 500, (status, body)
    if status != 200:
        reply = ErrorReply.model_validate_json(body, strict=True)
        assert json.loads(body) == reply.model_dump()
        assert reply.error.message.endswith((".", "?")), reply
        assert len(reply.error.message) < 2000
    elif body.startswith(b"data: "):
        assert body.endswith(b"data: [DONE]\n\n")
        for event in body.split(b"\n\n")[:-2]:
            assert "choices" in json.loads(event.removeprefix(b"data: "))
    else:
        kind = CompletionReply if path == PATHS[0] else ChatReply
        kind.model_validate_json(body)
    return status


def random_body(random: random.Random) -> tuple[str, bytes]:
    """A valid request with up to three mistakes: in its values, its fields, or its bytes."""
    path, base = random.choice([(PATHS[0], COMPLETION), (PATHS[1], CHAT)])
    body: Any = copy.deepcopy(base)
    for option in random.sample(OPTIONS, random.randrange(4)):
        body |= copy.deepcopy(option)
    if random.random() < 0.2:
        body |= {"logprobs": 2, "echo": True} if path == PATHS[0] else {"logprobs": True}
    for _ in range(random.choice([0, 0, 1, 1, 1, 2, 3])):
        spots = list(places(body))
        container, key = random.choice(spots)
        kind = random.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[random.choice(["x", "", "n ", "prompt", "messages", "echo"])] = 1
        else:
            container[key] = copy.deepcopy(random.choice(NASTY))
        if not body:
            break
    text = bytearray(
        json.dumps(body, ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")
    )
    kind = random.randrange(10)
    if kind == 0:
        del text[random.randrange(len(text)) :]
    elif kind == 1:
        text[random.randrange(len(text))] = random.randrange(256)
    elif kind == 2:
        at = random.randrange(len(text))
        text[at : at + random.randrange(5)] = random.choice(RAW)
    elif kind == 3 and random.random() < 0.3:
        text = bytearray(random.randbytes(random.randrange(200)))
    return path, bytes(text)


def places(value: Any):
    """Every (container, key) in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def test_random_bodies(capsys):
    """Of these, enough are accepted and enough are refused that both are tested."""

    async def send_all() -> collections.Counter[int]:
        app = make_fuzzed()
        source = random.Random(0)
        statuses: collections.Counter[int] = collections.Counter()
        for _ in range(BODIES):
            path, body = random_body(source)
            try:
                statuses[check(path, *await post(app, path, body))] += 1
            except Exception as error:
                error.add_note(f"{path} {body!r}")
                raise
        return statuses

    statuses = asyncio.run(send_all())
    with capsys.disabled():
        print(f"\n{statuses.total()} random bodies: {dict(sorted(statuses.items()))}")
    assert statuses.total() == BODIES
    assert statuses[200] > BODIES / 10
    assert statuses[400] > BODIES / 10
    assert set(statuses) <= {200, 400, 404}


APP = make_fuzzed()
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@schema.parametrize()
@settings(
    max_examples=sized("serving", full=40, quick=10),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
def test_published_schema(case):
    """Requests made from the schema: every response is documented with its status, type and schema."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL  # else nearly all were a 404
    validate(case)


@pytest.mark.parametrize(("path", "body"), [(PATHS[0], COMPLETION), (PATHS[1], CHAT)])
def test_events_are_those_of_the_schema(path, body):
    validate(schema[path]["POST"].Case(body=body | {"stream": True}))


def validate(case: schemathesis.Case) -> None:
    """The response to this request is documented with its status, type and schema."""
    case.call_and_validate(
        checks=[
            schemathesis.checks.not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ],
        timeout=LIMIT,  # for a response; 10 s by default
    )


def test_schema_is_complete():
    """Every operation says which errors it has; the bodies' limits are the server's."""
    document = APP.openapi()
    error = {"$ref": "#/components/schemas/ErrorReply"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses
            for status, response in responses.items():
                if status != "200":
                    assert response["content"]["application/json"]["schema"] == error
            if path in PATHS:
                wanted = "200 400 401 404 408 413 415 429 500 503"
                assert sorted(responses) == wanted.split()
    request = document["components"]["schemas"]["ChatRequest"]
    assert request["additionalProperties"] is False
    assert request["required"] == ["model", "messages"]
    assert request["properties"]["tool_choice"]["enum"] == ["none", "auto", None]
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
