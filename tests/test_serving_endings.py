"""How responses end early: a client leaves, the queue is full, the engine fails, the server stops."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from fake_engine import CAPACITY, MODEL, FakeEngine, FakeTokens, serving

from helix_megatron.errors import HelixError
from helix_megatron.serving import server as server_module
from helix_megatron.serving.app import make_app
from helix_megatron.serving.server import Server, listen
from helix_megatron.serving.settings import ServerSettings

SLOW = 0.02  # seconds between tokens: 2,000 tokens would take 40 s
ENDLESS = {"model": MODEL, "prompt": "hello ", "max_tokens": 2000}


def events(text: str) -> list[dict]:
    """The JSON of each event but `[DONE]`."""
    data = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(one) for one in data if one != "[DONE]"]


def test_client_leaves_a_stream():
    """Its sequences are cancelled at once, all of them."""
    with serving(FakeEngine(tick=SLOW)) as served, served.openai() as client:
        stream = client.completions.create(**ENDLESS, n=3, stream=True)
        next(iter(stream))
        assert served.engine.busy(3)
        left = time.monotonic()
        stream.close()
        assert served.engine.idle()
        assert time.monotonic() - left < 1
        assert len(served.engine.cancelled) == 3


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_connection_is_cut(path, stream):
    """Also when it waits for a whole response, or for a first token that has not come."""
    body = {"model": MODEL, "max_tokens": 2000, "stream": stream}
    if path == "completions":
        body["prompt"] = "x"
    else:
        body["messages"] = [{"role": "user", "content": "x"}]
    content = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with serving(FakeEngine(tick=SLOW)) as served:
        connection = socket.create_connection(("127.0.0.1", int(served.url.rsplit(":")[-1])))
        connection.sendall(head + content)
        assert served.engine.busy()
        connection.close()
        assert served.engine.idle()
        assert served.engine.cancelled == served.engine.submitted
        time.sleep(0.05)
        metrics = served.http().get("/metrics").text
    status = 200 if stream else 499
    assert f'helix_http_requests_total{{route="/v1/{path}",status="{status}"}} 1.0' in metrics
    assert "helix_engine_running_sequences 0.0" in metrics


def test_client_leaves_the_queue():
    """A sequence that waits is cancelled, too, and the next one gets its place."""
    capacity = dataclasses.replace(CAPACITY, max_sequences=1, max_waiting=1)
    with serving(FakeEngine(capacity, tick=SLOW)) as served, served.http() as http:
        with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}):
            assert served.engine.busy()
            with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}):
                pass
            deadline = time.monotonic() + 5
            while not served.engine.cancelled and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served.engine.cancelled == [served.engine.submitted[1]]
        assert served.engine.idle()


def test_queue_full():
    """429, and when to come back; the request that runs is not disturbed."""
    capacity = dataclasses.replace(CAPACITY, max_sequences=1, max_waiting=1)
    with serving(FakeEngine(capacity, tick=SLOW)) as served, served.openai() as client:
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
    with serving(FakeEngine(tick=SLOW), max_open_requests=2) as served, served.openai() as client:
        streams = [client.completions.create(**ENDLESS, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 requests are open, which is the limit"):
            client.completions.create(**ENDLESS)
        streams[0].close()
        assert next(iter(streams[1]))
        deadline = time.monotonic() + 5
        while not served.engine.cancelled and time.monotonic() < deadline:
            time.sleep(0.01)
        assert client.completions.create(model=MODEL, prompt="x", max_tokens=1).choices
        streams[1].close()


def test_engine_fails():
    """What runs, whole or streamed, waiting or not, ends with an error; what comes later is refused."""
    capacity = dataclasses.replace(CAPACITY, max_sequences=2)
    reason = "rank 3 is out of memory."
    with (
        serving(FakeEngine(capacity, tick=SLOW)) as served,
        served.http() as http,
        ThreadPoolExecutor() as threads,
    ):
        bodies = [ENDLESS | {"stream": stream} for stream in (False, True, False, True)]
        responses = [threads.submit(http.post, "/v1/completions", json=body) for body in bodies]
        deadline = time.monotonic() + 5
        while len(served.engine.submitted) < len(bodies) and time.monotonic() < deadline:
            time.sleep(0.01)
        served.engine.fail(reason)
        for body, future in zip(bodies, responses, strict=True):
            response = future.result(timeout=5)
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
    with serving(FakeEngine(tick=SLOW)) as served, served.openai() as client:
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

    with serving(FakeEngine(tick=SLOW, script=script)) as served, served.openai() as client:
        with pytest.raises(openai.InternalServerError, match="its page is gone"):
            client.completions.create(model=MODEL, prompt=[[1], [2], [3]], max_tokens=1000)
        assert served.engine.idle()
        assert len(served.engine.cancelled) == 2


def test_engine_stops():
    """Its queue is closed and the server does not know: 503, not a mistake of the server."""
    with serving() as served, served.openai() as client:
        served.engine.stop()
        with pytest.raises(openai.InternalServerError, match="the engine is stopping") as error:
            client.completions.create(**ENDLESS)
        assert error.value.status_code == 503


def test_announced_stop():
    """While the engine finishes, open streams go on, and load balancers see that nothing new is taken."""
    with serving(FakeEngine(tick=SLOW)) as served, served.http() as http:
        body = ENDLESS | {"max_tokens": 20, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            served.server.announce_stop()
            assert http.get("/health").status_code == 503
            assert http.post("/v1/completions", json=ENDLESS).status_code == 503
            assert http.get("/metrics").status_code == 200
            assert "[DONE]" in response.read().decode()


def test_stop_waits_for_responses():
    """Up to the time given; new connections are refused meanwhile."""
    with serving(FakeEngine(tick=SLOW)) as served, ThreadPoolExecutor() as threads:
        body = ENDLESS | {"max_tokens": 25}
        response = threads.submit(httpx.post, f"{served.url}/v1/completions", json=body, timeout=20)
        assert served.engine.busy()
        started = time.monotonic()
        served.server.stop(drain_seconds=10)
        assert time.monotonic() - started < 5
        assert response.result().json()["usage"]["completion_tokens"] == 25
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
        served.server.stop()  # again, without harm


def test_a_request_that_comes_while_the_server_stops():
    """It had begun before: its connection is answered, with 503, and nothing is started for it."""
    with serving() as served, ThreadPoolExecutor() as threads:
        port = int(served.url.rsplit(":")[-1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            content = json.dumps(ENDLESS).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content[:5])
            time.sleep(0.1)
            stopped = threads.submit(served.server.stop, 10)
            time.sleep(0.2)
            connection.sendall(content[5:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")
        stopped.result(timeout=5)
        assert not served.engine.submitted


def test_stop_ends_responses():
    """When the time is over they end with an error that the client can read, and are cancelled."""
    with serving(FakeEngine(tick=SLOW)) as served, ThreadPoolExecutor() as threads:
        responses = [
            threads.submit(
                httpx.post,
                f"{served.url}/v1/completions",
                json=ENDLESS | {"stream": stream},
                timeout=20,
            )
            for stream in (False, True)
        ]
        assert served.engine.busy(2)
        started = time.monotonic()
        served.server.stop(drain_seconds=0.3)
        assert time.monotonic() - started < 2.5
        whole, stream = (response.result() for response in responses)
        assert whole.status_code == 503
        assert events(stream.text)[-1]["error"]["code"] == "service_unavailable"
        assert "[DONE]" not in stream.text
        assert served.engine.idle()


def test_a_client_that_does_not_read():
    """It is cut off: its sequences and its place are for others."""
    text = "x" * 60_000  # a stop string that may still come holds back nothing of it

    class LongWords(FakeTokens):
        def decoder(self, after=()):
            stream = super().decoder(after)
            stream.add = lambda tokens: text * len(tokens)
            return stream

    engine = FakeEngine(tick=0.001)
    settings = ServerSettings(MODEL, send_seconds=0.3)
    server = Server(make_app(engine, LongWords(), settings), listen("127.0.0.1", 0))
    port = server.start()
    content = json.dumps(ENDLESS | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + content)
        assert engine.busy()
        assert engine.idle()
        assert len(engine.cancelled) == 1
    server.stop()
    engine.stop()


def test_long_texts_do_not_stop_streams():
    """Tokenising is in a thread of its own: the longest pause of a stream is far shorter than it takes."""

    class SlowTokens(FakeTokens):
        def encode(self, text):
            if text == "slow":
                begun.set()
                time.sleep(1)
            return super().encode(text)

    begun = threading.Event()
    engine = FakeEngine(tick=0.005)
    server = Server(make_app(engine, SlowTokens(), ServerSettings(MODEL)), listen("127.0.0.1", 0))
    url = f"http://127.0.0.1:{server.start()}/v1/completions"
    with (
        ThreadPoolExecutor() as threads,
        httpx.stream("POST", url, json=ENDLESS | {"stream": True}) as news,
    ):
        lines = news.iter_lines()
        next(lines)
        slow = threads.submit(httpx.post, url, json=ENDLESS | {"prompt": "slow", "max_tokens": 1})
        assert begun.wait(5)
        times = []
        while not slow.done():
            next(lines)
            times.append(time.monotonic())
        assert slow.result().status_code == 200
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert max(pauses) < 0.5
    server.stop()
    engine.stop()


def test_an_endless_header_is_refused():
    """Memory of the server is not the client's to fill, with a key or without one."""
    with serving() as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port.split("/")[0])), timeout=20) as raw:
            raw.sendall(b"GET /health HTTP/1.1\r\nX: ")
            with contextlib.suppress(ConnectionError):
                for _ in range(64):
                    raw.sendall(b"a" * 16384)
                    time.sleep(0.002)
                pytest.fail("a header of 1 MiB was taken")


def test_a_connection_that_says_nothing_is_closed(monkeypatch):
    """Idle connections must not use up the server's files."""
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.2)
    with serving() as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port.split("/")[0])), timeout=20) as raw:
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
        with pytest.raises(HelixError, match=r"The port is 70000\. Valid: 1 to 65535"):
            listen("127.0.0.1", 70000)
        with pytest.raises(HelixError, match=r"The host 'no such host' is not known: .* Try 127"):
            listen("no such host", 0)
        with pytest.raises(HelixError, match=r"the host must be an address of this machine"):
            listen("192.0.2.1", 0)
