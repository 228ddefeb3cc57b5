"""OpenAI's own client against the real server: what users will do."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import Iterator

import openai
import pytest
from fake_engine import CAPACITY, END, MODEL, FakeEngine, Served, serving
from tiers import sized
from waiting import LIMIT, printed_afresh

ASK = [{"role": "user", "content": "hello "}]
CLIENTS = sized("serving", full=200, quick=40)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return served.openai()


def test_no_torch():
    """The server's side must start fast, and run where there is no torch."""
    assert printed_afresh("import helix_megatron.serving.server") == ["[]"]


def test_no_thread_for_a_request(client):
    """What a thread frees stays its own: a server that hops to others grows with its load."""
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    names = {thread.name for thread in threading.enumerate()}
    assert "helix-http" in names
    assert not any("AnyIO" in name for name in names)


def test_completion(client):
    """OpenAI's default of max_tokens is 16."""
    answer = client.completions.create(model=MODEL, prompt="hello ")
    assert answer.object == "text_completion"
    assert answer.model == MODEL
    assert answer.choices[0].text == "hello hello hell"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)
    assert answer.usage.total_tokens == 22


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "xyz"], ["abab", "xyzx"]),
        ([104, 105], ["hihi"]),
        ([[104, 105], [106]], ["hihi", "jjjj"]),
        ("é", ["éé"]),
    ],
)
def test_kinds_of_prompts(client, prompt, texts):
    """Strings, token ids, and lists of both; a character of two tokens is never cut."""
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=4)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_chat(client):
    """Without max_tokens it goes on to the end of the context."""
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_completion_tokens=5)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "hello"
    assert answer.usage.completion_tokens == 5
    answer = client.chat.completions.create(model=MODEL, messages=ASK)
    assert answer.usage.total_tokens == CAPACITY.max_context
    assert answer.choices[0].finish_reason == "length"


def test_a_conversation_goes_on(client):
    """The client's own message object, with its null fields, is sent back; parts are text, too."""
    first = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5)
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    rules = {"role": "developer", "content": "Be brief."}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[rules, *ASK, first.choices[0].message, turn],
        max_tokens=3,
        user="me",
        tools=[],
        frequency_penalty=0.0,
        response_format={"type": "text"},
    )
    assert answer.choices[0].message.content == "a\nb"


def test_end_of_text(client):
    """A stop token ends a text and is not a part of it; it counts, since it was generated."""
    prompt = [104, 105, END]
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=10)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hi", "stop")
    assert answer.usage.completion_tokens == 3
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == "hi<end>hi<end>h"
    assert answer.choices[0].finish_reason == "length"


def test_streams(client):
    """The pieces are the whole; usage comes last, and only if it is asked for."""
    whole = client.completions.create(model=MODEL, prompt="hello ", max_tokens=50).choices[0].text
    pieces = client.completions.create(model=MODEL, prompt="hello ", max_tokens=50, stream=True)
    chunks = list(pieces)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    *chunks, last = client.chat.completions.create(
        model=MODEL,
        messages=ASK,
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[1].choices[0].delta.role is None
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 50)


def test_choices(served, client):
    """Each of n choices is a sequence of its own, with a seed of its own, or they would all be the same."""
    before = len(served.engine.submitted)
    answer = client.completions.create(
        model=MODEL,
        prompt=["ab", "xyz"],
        n=2,
        seed=-1,
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        extra_body={"top_k": 7, "best_of": 2},
    )
    assert [choice.text for choice in answer.choices] == ["aba", "aba", "xyz", "xyz"]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 12
    samplings = [request.sampling for request in served.engine.submitted[before:]]
    assert [sampling.seed for sampling in samplings] == [2**63 - 1, 0] * 2
    assert {(one.temperature, one.top_p, one.top_k) for one in samplings} == {(0.5, 0.9, 7)}
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=ASK, n=2, max_tokens=9, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "hello hel", 1: "hello hel"}


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(stream):
    """They cross tokens, are not returned, and free the engine at once; their beginnings are text."""
    tokens = 10**6  # which take hours: only the stop string can have ended the text
    options = {"model": MODEL, "prompt": "one STOX STOP two ", "max_tokens": tokens}
    options["stream"] = stream
    capacity = dataclasses.replace(CAPACITY, max_context=2 * tokens)
    with serving(FakeEngine(capacity, tick=0.01)) as served, served.openai() as client:
        answer = client.completions.create(**options, stop=["STOP", "never"])
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == "one STOX "
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert served.engine.idle()
        assert served.engine.cancelled == served.engine.submitted


def test_held_back_text_comes_at_the_end(client):
    """What could have become a stop string or a whole character, and did not, is not lost."""
    answer = client.completions.create(model=MODEL, prompt="é", max_tokens=3)
    assert answer.choices[0].text == "é\ufffd"
    answer = client.completions.create(model=MODEL, prompt="abc", max_tokens=3, stop="cd")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("abc", "length")


def test_models(client):
    """Names with slashes, as on the Hugging Face Hub."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"
    assert "There is no model 'gpt-9'. Valid: org/model." in str(error.value)


def test_many_clients_at_once():
    """Many streams of the asynchronous client: all are complete, and none gets another's text."""

    async def one(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model=MODEL, prompt=f"<{number}>", max_tokens=60, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them(url: str) -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=url, api_key="none", max_retries=0, timeout=LIMIT
        ) as client:
            return await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))

    with serving(FakeEngine(tick=0.005, start_at=CLIENTS // 2 + 1)) as served:
        texts = asyncio.run(all_of_them(f"{served.url}/v1"))
        most = served.engine.most_running
    for number, text in enumerate(texts):
        assert text == "".join(itertools.islice(itertools.cycle(f"<{number}>"), 60))
    assert most > CLIENTS // 2


def test_errors_are_the_clients(client):
    """The client finds message, param and code where it looks for them."""
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x", max_tokens=5000)
    assert error.value.status_code == 400
    assert error.value.type == "invalid_request_error"
    assert (error.value.param, error.value.code) == ("prompt", "context_length_exceeded")
    assert error.value.body["message"]
