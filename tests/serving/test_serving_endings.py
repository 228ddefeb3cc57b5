"""How responses end early: a client leaves, the queue is full, the engine fails, the server stops."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import CAPACITY, MODEL, FakeTokens, head, serving, until_set
from fake_engine import FakeEngine as AnyEngine
from waiting import LIMIT, wait_until

from helix_megatron.errors import HelixError
from helix_megatron.serving import server as server_module
from helix_megatron.serving.server import listen

SLOW = 0.02  # seconds between tokens
TOKENS = 10**6  # take more than five hours: only what a test does can end such a text
ENDLESS = {"model": MODEL, "prompt": "hello ", "max_tokens": TOKENS}
LONG = dataclasses.replace(CAPACITY, max_context=2 * TOKENS)
FakeEngine = functools.partial(AnyEngine, capacity=LONG, tick=SLOW)


def events(text: str) -> list[dict]:
    """The JSON of each event but `[DONE]`."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(one) for one in data if one != "[DONE]"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_connection_is_cut(path, stream):
    """All sequences are cancelled: by themselves they would go on for hours."""
    body = {"model": MODEL, "max_tokens": TOKENS, "stream": stream, "n": 3}
    if path == "completions":
        body["prompt"] = "x"
    else:
        body["messages"] = [{"role": "user", "content": "x"}]
    content = json.dumps(body).encode()
    with serving(FakeEngine()) as served:
        connection = served.connect()
        connection.sendall(head(path, len(content)) + content)
        assert served.engine.busy(3)
        connection.close()
        assert served.engine.idle()
        assert set(served.engine.cancelled) == set(served.engine.submitted)
        status = 200 if stream else 499
        line = f'helix_http_requests_total{{route="/v1/{path}",status="{status}"}} 1.0'
        http = served.http()
        wait_until(lambda: line in http.get("/metrics").text, "the request is counted")
        assert "helix_engine_running_sequences 0.0" in http.get("/metrics").text


def test_client_leaves_the_queue():
    """A sequence that waits is cancelled, too, and the next one gets its place."""
    capacity = dataclasses.replace(LONG, max_sequences=1, max_waiting=1)
    with serving(FakeEngine(capacity=capacity)) as served, served.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}):
            assert served.engine.busy()
            with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}):
                pass
            wait_until(lambda: served.engine.cancelled, "the closed stream is cancelled")
            assert served.engine.cancelled == [served.engine.submitted[1]]
        assert served.engine.idle()


def test_queue_full():
    """429, and when to come back; the request that runs is not disturbed."""
    capacity = dataclasses.replace(LONG, max_sequences=1, max_waiting=1)
    with serving(FakeEngine(capacity=capacity)) as served, served.openai() as client:
        running = client.completions.create(**ENDLESS, stream=True)
        waiting = client.completions.create(**ENDLESS, stream=True)
        assert served.engine.busy()
        for stream in (
            False,
            True,
        ):  # it is an error of HTTP for streams, too: nothing was sent before
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(**ENDLESS, stream=stream)
            assert error.value.response.headers["retry-after"] == "1"
            assert error.value.type == "rate_limit_error"
            assert error.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.BadRequestError, match=r"3 sequences\. Valid: up to 2"):
            client.completions.create(**ENDLESS, n=3)
        assert next(iter(running)).choices[0].text
        running.close()
        waiting.close()


def test_open_requests_are_bounded():
    """Before a body is read: many of them must not fill the memory."""
    with serving(FakeEngine(), max_open_requests=2) as served, served.openai() as client:
        streams = [client.completions.create(**ENDLESS, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 requests are open, which is the limit"):
            client.completions.create(**ENDLESS)
        streams[0].close()
        assert next(iter(streams[1]))

        def accepted() -> bool:
            with contextlib.suppress(openai.RateLimitError):
                return bool(
                    client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
                )
            return False

        wait_until(accepted, "the place of the closed stream is free")
        assert served.engine.cancelled == served.engine.submitted[:1]
        streams[1].close()


def test_engine_fails():
    """What runs, whole or streamed, waiting or not, ends with an error; what comes later is refused."""
    capacity = dataclasses.replace(LONG, max_sequences=2)
    reason = "rank 3 is out of memory."
    with (
        serving(FakeEngine(capacity=capacity)) as served,
        served.http() as http,
        ThreadPoolExecutor() as threads,
    ):
        bodies = [ENDLESS | {"stream": stream} for stream in (False, True, False, True)]
        responses = [threads.submit(http.post, "/v1/completions", json=body) for body in bodies]
        wait_until(lambda: len(served.engine.submitted) == len(bodies), "all are submitted")
        served.engine.fail(reason)
        for body, future in zip(bodies, responses, strict=True):
            response = future.result(LIMIT)
            if body["stream"]:
                assert response.status_code == 200
                assert "[DONE]" not in response.text
                error = events(response.text)[-1]["error"]
            else:
                assert response.status_code == 500
                error = response.json()["error"]
            assert error == {
                "message": f"The engine failed: {reason}",
                "type": "server_error",
                "param": None,
                "code": "engine_failure",
            }
        for response in (http.get("/health"), http.post("/v1/completions", json=ENDLESS)):
            assert response.status_code == 503
            assert reason in response.json()["error"]["message"]
        metrics = http.get("/metrics").text
    assert "helix_failed_streams_total 2.0" in metrics
    assert "helix_engine_healthy 0.0" in metrics


def test_the_client_sees_a_stream_fail():
    """OpenAI's client raises in the middle of the stream: half an answer is not taken for a whole one."""
    with serving(FakeEngine()) as served, served.openai() as client:
        stream = iter(client.completions.create(**ENDLESS, stream=True))
        next(stream)
        served.engine.fail("a rank was lost.")
        with pytest.raises(openai.APIError, match=r"The engine failed: a rank was lost\."):
            list(stream)


def test_one_choice_fails():
    """The response fails, and its other sequences are cancelled."""

    def script(request):
        yield from request.prompt
        if request.prompt == (1,):
            served.engine.lose(request, "its page is gone.")
        while True:
            yield 65

    with serving(FakeEngine(script=script)) as served, served.openai() as client:
        with pytest.raises(openai.InternalServerError, match="its page is gone"):
            client.completions.create(model=MODEL, prompt=[[1], [2], [3]], max_tokens=TOKENS)
        assert served.engine.idle()
        assert len(served.engine.cancelled) == 2


def test_engine_stops():
    """Its queue is closed and the server does not know: 503, not a mistake of the server."""
    with serving(FakeEngine()) as served, served.openai() as client:
        served.engine.stop()
        with pytest.raises(openai.InternalServerError, match="the engine is stopping") as error:
            client.completions.create(**ENDLESS)
        assert error.value.status_code == 503


def test_announced_stop():
    """While the engine finishes, open streams go on, and load balancers see that nothing new is taken."""
    finish = threading.Event()
    with (
        serving(FakeEngine(script=until_set(finish))) as served,
        served.http() as http,
        http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as response,
    ):
        served.server.announce_stop()
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json=ENDLESS).status_code == 503
        assert http.get("/metrics").status_code == 200
        finish.set()
        assert "[DONE]" in response.read().decode()


def test_stop_waits_for_responses():
    """As long as they take, within the time given; new connections are refused meanwhile."""
    finish = threading.Event()
    engine = FakeEngine(script=until_set(finish))
    with serving(engine) as served, ThreadPoolExecutor() as threads:
        url = f"{served.url}/v1/completions"
        response = threads.submit(httpx.post, url, json=ENDLESS, timeout=LIMIT)
        assert engine.busy()
        stopped = threads.submit(served.server.stop, drain_seconds=100 * LIMIT)
        wait_until(lambda: refused(served.url), "new connections are refused")
        assert not stopped.done() and not response.done()
        finish.set()
        assert response.result(LIMIT).json()["choices"][0]["finish_reason"] == "stop"
        stopped.result(LIMIT)
        served.server.stop()  # again, without harm


def refused(url: str) -> bool:
    """Whether new connections are: a server that stops closes its socket a moment after it was told."""
    try:
        httpx.get(f"{url}/health", timeout=LIMIT)
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass  # taken by the system, and not by the server any more
    return False


def test_a_request_that_comes_while_the_server_stops():
    """It had begun before: its connection is answered, with 503, and nothing is started for it."""
    with serving(FakeEngine()) as served, ThreadPoolExecutor() as threads:
        with served.connect() as connection:
            content = json.dumps(ENDLESS).encode()
            connection.sendall(head(length=len(content)) + content[:5])
            begun = "helix_http_requests_in_flight 2.0"  # one of them asks for this
            with served.http() as http:
                wait_until(lambda: begun in http.get("/metrics").text, "the request has begun")
            stopped = threads.submit(served.server.stop, 100 * LIMIT)
            wait_until(lambda: refused(served.url), "new connections are refused")
            connection.sendall(content[5:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")
        stopped.result(LIMIT)
        assert not served.engine.submitted


def test_stop_ends_responses():
    """When the time is over they end with an error that the client can read, and are cancelled."""
    with serving(FakeEngine()) as served, ThreadPoolExecutor() as threads:
        responses = [
            threads.submit(
                httpx.post,
                f"{served.url}/v1/completions",
                json=ENDLESS | {"stream": stream},
                timeout=LIMIT,
            )
            for stream in (False, True)
        ]
        assert served.engine.busy(2)
        served.server.stop(drain_seconds=0.3)
        whole, stream = (response.result(LIMIT) for response in responses)
        assert whole.status_code == 503
        assert events(stream.text)[-1]["error"]["code"] == "service_unavailable"
        assert "[DONE]" not in stream.text
        assert served.engine.idle()


def test_a_client_that_does_not_read():
    """It is cut off: its sequences and its place are for others."""
    text = "x" * 60_000  # a stop string that may still come holds back nothing of it

    class LongWords(FakeTokens):
        def decoder(self, after=(), special=False):
            stream = super().decoder(after)
            stream.add = lambda tokens: text * len(tokens)
            return stream

    engine = FakeEngine(tick=0.001)
    content = json.dumps(ENDLESS | {"stream": True}).encode()
    with serving(engine, LongWords(), send_seconds=0.3) as served, served.connect() as connection:
        connection.sendall(head(length=len(content)) + content)
        assert engine.busy()
        assert engine.idle()
        assert len(engine.cancelled) == 1


def test_long_texts_do_not_stop_streams():
    """Tokenising is in a thread of its own: a stream goes on meanwhile, however long it takes."""

    class SlowTokens(FakeTokens):
        def encode(self, text, begin=True):
            if text == "slow":
                begun.set()
                assert enough.wait(LIMIT)
            return super().encode(text)

    begun, enough = threading.Event(), threading.Event()
    engine = FakeEngine(tick=0.005)
    with (
        serving(engine, SlowTokens()) as served,
        served.http() as http,
        ThreadPoolExecutor() as threads,
        http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as news,
    ):
        lines = news.iter_lines()
        body = ENDLESS | {"prompt": "slow", "max_tokens": 1}
        slow = threads.submit(http.post, "/v1/completions", json=body)
        assert begun.wait(LIMIT)
        # More than what was generated before and was still to be read.
        told = engine.stats().generated_tokens
        for _ in range(2 * told + 100):
            next(lines)
        assert not slow.done()
        enough.set()
        assert slow.result(LIMIT).status_code == 200


def test_an_endless_header_is_refused():
    """Memory of the server is not the client's to fill, with a key or without one."""
    with serving() as served, served.connect() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            for _ in range(1024):
                raw.sendall(b"a" * 65536)
            pytest.fail("a header of 64 MiB was taken: more than any socket holds")


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    """Idle connections must not use up the server's files."""
    with serving() as served, monkeypatch.context() as patch:
        patch.setattr(server_module, "HEADER_SECONDS", 0.2)  # before the server accepts
        with served.connect() as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
            assert raw.recv(64) == b""


def test_port_taken():
    """Who starts two servers is told which address is taken, and what to try."""
    with serving() as served:
        port = int(served.url.rsplit(":")[-1])
        with pytest.raises(HelixError) as error:
            listen("127.0.0.1", port)
        text = f"Cannot listen on 127.0.0.1 port {port}: Address already in use. Try another port, or 0"
        assert str(error.value).startswith(text)
        with pytest.raises(HelixError, match=r"The host 'no such host' is not known: .* Try 127"):
            listen("no such host", 0)
        with pytest.raises(HelixError, match=r"the host must be an address of this machine"):
            listen("192.0.2.1", 0)
