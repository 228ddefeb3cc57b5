"""The parts below the routes: stop strings, the way from the engine's thread, what is asked of the engine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading

import pytest
from fake_engine import CAPACITY, MODEL, FakeEngine, FakeTokens
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import Request
from tiers import sized
from waiting import LIMIT

from helix_megatron.inference.request import MAX_SEED, Output
from helix_megatron.inference.stop_strings import StopStrings
from helix_megatron.serving.api_errors import ApiError, encoded, shown
from helix_megatron.serving.app import make_app
from helix_megatron.serving.body import DISCARD_FACTOR, Bodies, Room, read_body
from helix_megatron.serving.mailbox import Mailbox
from helix_megatron.serving.replies import ChatDelta, ErrorDetail
from helix_megatron.serving.schema import ChatRequest, CompletionRequest, parse
from helix_megatron.serving.settings import ServerSettings

LETTERS = st.text("ab", max_size=12)


def first_stop(text: str, strings: list[str]) -> str | None:
    """The text before the first stop string, read character by character; None without one."""
    for end in range(len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))]
    return None


@settings(max_examples=sized("serving", full=500, quick=100), deadline=None)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=4))
def test_stop_strings(pieces, strings):
    """Wherever the pieces are cut: the text before the first stop string, and all of it without one."""
    stops = StopStrings(strings)
    sent = "".join(stops.add(piece) for piece in pieces)
    text = "".join(pieces)
    expected = first_stop(text, strings)
    assert stops.hit == (expected is not None)
    if expected is None:
        assert text.startswith(sent)
        assert sent + stops.finish() == text
    else:
        assert sent == expected
        assert stops.add("a") == stops.finish() == ""


def test_only_what_may_become_a_stop_string_is_held_back():
    """A stream must not lag behind more than it has to."""
    stops = StopStrings(["</end>", "xyz"])
    sent = [stops.add(piece) for piece in ("a<", "b", "c</", "end", "x", "y", "-")]
    assert sent == ["a", "<b", "c", "", "</end", "", "xy-"]


def test_mailbox():
    """Nothing is lost or out of order between threads, and the loop is woken far less often than once each."""
    count, senders = 5000, 4

    async def receive() -> tuple[dict[int, list[int]], int]:
        loop = asyncio.get_running_loop()
        wakes = 0
        wake = loop.call_soon_threadsafe

        def counting(*arguments):
            nonlocal wakes
            wakes += 1
            return wake(*arguments)

        loop.call_soon_threadsafe = counting
        mailbox = Mailbox(loop)
        inbox: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

        def send(sender: int) -> None:
            listen = mailbox.listener(lambda output: inbox.put_nowait((sender, output.tokens[0])))
            for number in range(count):
                listen(Output((number,)))

        threads = [threading.Thread(target=send, args=(sender,)) for sender in range(senders)]
        for thread in threads:
            thread.start()
        received: dict[int, list[int]] = {sender: [] for sender in range(senders)}
        while sum(map(len, received.values())) < count * senders:
            sender, number = await asyncio.wait_for(inbox.get(), LIMIT)
            received[sender].append(number)
        return received, wakes

    received, wakes = asyncio.run(receive())
    assert all(numbers == list(range(count)) for numbers in received.values())
    assert 0 < wakes < count


def test_a_closed_loop_does_not_hurt_the_engine():
    """Listeners must not raise: the server's loop may end before the engine's."""
    loop = asyncio.new_event_loop()
    listen = Mailbox(loop).listener(lambda output: None)
    loop.close()
    listen(Output((1,)))
    listen(Output((2,), "length"))


def test_endless_body():
    """However fast it comes: a bounded part is read, so that the answer arrives, and nothing of it kept."""
    chunks = 0

    async def receive():
        nonlocal chunks
        chunks += 1
        return {"type": "http.request", "body": bytes(100), "more_body": True}

    limits = ServerSettings(MODEL, max_body_bytes=1000)
    headers = [(b"content-type", b"application/json")]
    request = Request({"type": "http", "headers": headers}, receive)
    with pytest.raises(ApiError, match="larger than 1000 bytes"):
        asyncio.run(read_body(request, limits, Room(Bodies(10**6))))
    assert chunks == DISCARD_FACTOR * 10 + 1


def planned(body: dict, kind=CompletionRequest, context: int = 100):
    capacity = dataclasses.replace(CAPACITY, max_context=context)
    app = make_app(FakeEngine(capacity), FakeTokens(), ServerSettings(MODEL))
    text = json.dumps({"model": MODEL} | body).encode()
    return asyncio.run(app.state.service.planned(text, kind))[1]


def test_lengths():
    """Completions have 16 tokens, chats what fits; what the client wants is never cut silently."""
    ask = {"messages": [{"role": "user", "content": "x" * 30}]}
    assert planned({"prompt": "x"}).samplings[0][0].max_tokens == 16
    assert planned({"prompt": "x" * 90}).samplings[0][0].max_tokens == 10
    assert planned(ask, ChatRequest).samplings[0][0].max_tokens == 70
    assert planned(ask | {"max_tokens": 5}, ChatRequest).samplings[0][0].max_tokens == 5
    assert planned({"prompt": "x" * 99, "max_tokens": 1}).samplings[0][0].max_tokens == 1
    for body in ({"prompt": "x" * 100}, {"prompt": "x" * 99, "max_tokens": 2}):
        with pytest.raises(ApiError) as error:
            planned(body)
        assert error.value.code == "context_length_exceeded"


def test_sampling():
    """OpenAI's defaults; negative seeds; -1 as other servers write `no limit`."""
    (sampling,) = planned({"prompt": "x"}).samplings[0]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed) == (1, 0, 1, None)
    assert sampling.stop_tokens == FakeTokens().stop_tokens
    body = {"prompt": "x", "seed": -(2**63), "top_k": -1, "n": 3, "temperature": 0}
    samplings = planned(body | {"ignore_eos": True}).samplings[0]
    assert [sampling.seed for sampling in samplings] == [0, 1, 2]
    assert samplings[0].greedy and samplings[0].top_k == 0 and not samplings[0].stop_tokens
    assert planned({"prompt": "x", "seed": -1}).samplings[0][0].seed == MAX_SEED


def test_what_templates_are_told():
    """They know `system`, OpenAI's old name of `developer`, and want arguments of tools as values."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "a", "annotations": [], "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "b"}], "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    body = {"model": MODEL, "messages": messages, "tools": [{}], "tool_choice": "none"}
    request = parse(json.dumps(body).encode(), ChatRequest, 100)
    parsed = call | {"function": {"name": "f", "arguments": {"x": 1}}}
    assert [message.plain() for message in request.messages] == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b", "name": "me"},
        {"role": "assistant", "content": "", "reasoning_content": "c", "tool_calls": [parsed]},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    with pytest.raises(ApiError, match=r"tools\[0\].type is required"):
        parse(json.dumps(body | {"tool_choice": "auto"}).encode(), ChatRequest, 100)


def test_what_a_decoder_should_not_say():
    """Half a surrogate pair cannot be sent; the rest of the text is."""
    assert encoded(ChatDelta(content="a\ud800b")) == b'{"content":"a?b"}'
    reply = ErrorDetail(message="\udfff", type="t", param=None, code=None)
    assert encoded(reply) == b'{"message":"?","type":"t","param":null,"code":null}'


@pytest.mark.parametrize("value", ["x" * 10_000, ["x" * 10_000], {"a": "x" * 10_000}, 10**4000])
def test_messages_stay_short(value):
    """A client's value is repeated up to a length, however it is nested."""
    assert len(shown(value)) <= 80


@pytest.mark.parametrize("wrong", [[1] + [-1] * 1000, ["x"] + [1] * 1000, [[1]] + [[]] * 1000])
def test_long_lists_fail_fast(wrong):
    """One error of a million wrong tokens is enough: each takes memory, and nobody reads them."""
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"model": MODEL, "prompt": wrong})
    assert error.value.error_count() == 1
