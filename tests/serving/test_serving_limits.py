"""What one client, or a template, may take from the others: text, time, connections; and a safe start."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fake_engine import CAPACITY, END, MODEL, FakeEngine, FakeTokens, head, serving
from waiting import LIMIT, wait_until

from helix_megatron.inference.request import TemplateLimitError
from helix_megatron.serving import command
from helix_megatron.serving import server as server_module
from helix_megatron.serving.planning import CHARACTERS_PER_TOKEN
from helix_megatron.serving.schema import ChatRequest

SMALL = dataclasses.replace(CAPACITY, max_context=64)
MOST = 64 * CHARACTERS_PER_TOKEN
TURN = {"role": "user", "content": "x"}
PARTS = [{"type": "text", "text": ""}] * 40


class Untouched(FakeTokens):
    """No text may come here."""

    def encode(self, text, begin=True):
        raise AssertionError("a text was tokenised")

    chat_text = encode


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": "x" * (MOST + 1)}, f"has {MOST + 1} characters."),
        ("completions", {"prompt": ["x", " " * (MOST + 1)]}, f"has {MOST + 1} characters."),
        ("chat/completions", {"messages": [TURN] * 65}, "has 65 messages and parts, more than"),
        (
            "chat/completions",
            {"messages": [TURN | {"content": PARTS}] * 2},
            "has 82 messages and parts, more than",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [{}] * 64}]},
            "has 65 messages and parts, more than",
        ),
        (
            "chat/completions",
            {"messages": [TURN | {"content": "x" * (MOST // 2 + 1)}] * 2},
            f"has {MOST + 2} characters.",
        ),
    ],
)
def test_texts_that_cannot_fit_are_not_looked_at(monkeypatch, path, body, message):
    """Tokenising, and checking 270,000 messages one by one, takes seconds from all others, and memory."""
    if "messages" in message:
        monkeypatch.setattr(ChatRequest, "model_validate", None)
    with serving(FakeEngine(SMALL), Untouched()) as served:
        response = served.http().post(f"/v1/{path}", json={"model": MODEL} | body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_a_template_may_not_make_a_text_that_cannot_fit():
    """It can repeat what it is given."""

    class Repeating(Untouched):
        def chat_text(self, messages, tools=()):
            return "x" * (MOST + 1)

    body = {"model": MODEL, "messages": [TURN]}
    with serving(FakeEngine(SMALL), Repeating()) as served:
        response = served.http().post("/v1/chat/completions", json=body)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_texts_take_turns():
    """The third prompt of a request comes after the first of another that came later."""

    class Slow(FakeTokens):
        def encode(self, text, begin=True):
            heard.append(text)
            assert enough.wait(LIMIT)
            return super().encode(text)

    heard: list[str] = []
    enough = threading.Event()
    with serving(FakeEngine(), Slow()) as served, ThreadPoolExecutor() as threads:
        post = functools.partial(httpx.post, f"{served.url}/v1/completions", timeout=LIMIT)
        body = {"model": MODEL, "max_tokens": 1}
        first = threads.submit(post, json=body | {"prompt": ["a1", "a2", "a3", "a4"]})
        wait_until(lambda: heard, "the first text is tokenised")
        second = threads.submit(post, json=body | {"prompt": "b"})
        waiting = served.server._service._texts._work_queue.qsize
        wait_until(waiting, "the second request waits to be read")
        enough.set()
        assert first.result(LIMIT).status_code == second.result(LIMIT).status_code == 200
    assert heard.index("b") < heard.index("a3")


def test_a_template_that_does_not_end_is_told_by_health():
    """It keeps nobody waiting who has no conversation; one that ends shows that all is well again."""

    class Endless(FakeTokens):
        def chat_text(self, messages, tools=()):
            begun.set()
            assert enough.wait(LIMIT)
            if messages[-1]["content"] == "loop":
                raise TemplateLimitError("the template did not end.")
            return super().chat_text(messages)

    begun, enough = threading.Event(), threading.Event()
    with serving(FakeEngine(), Endless()) as served, ThreadPoolExecutor() as threads:
        http = served.http()
        chat = functools.partial(http.post, "/v1/chat/completions")
        body = {"model": MODEL, "messages": [TURN | {"content": "loop"}], "max_tokens": 1}
        looping = threads.submit(chat, json=body)
        assert begun.wait(LIMIT)
        for prompt in ("x", [ord("x"), END]):
            plain = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
            assert http.post("/v1/completions", json=plain).status_code == 200
        enough.set()
        assert "the template did not end." in looping.result(LIMIT).json()["error"]["message"]
        told = {"status": "degraded", "reason": "the template did not end."}
        assert http.get("/health").json() == told
        assert chat(json=body | {"messages": [TURN]}).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}


def test_a_stop_does_not_wait_for_a_template():
    """Nor for a long text: who waits for it is told, when the time to finish is over."""

    class Endless(FakeTokens):
        def chat_text(self, messages, tools=()):
            begun.set()
            assert closed.wait(LIMIT)
            return ""

        def close(self):
            closed.set()

    begun, closed = threading.Event(), threading.Event()
    with serving(FakeEngine(), Endless()) as served, ThreadPoolExecutor() as threads:
        body = {"model": MODEL, "messages": [TURN]}
        chat = threads.submit(served.http().post, "/v1/chat/completions", json=body)
        assert begun.wait(LIMIT)
        served.server.stop(0.1)
        assert chat.result(LIMIT).json()["error"]["code"] == "service_unavailable"
        assert closed.is_set()


# ------------------------------------------------------------------------------ connections


def test_a_second_header_must_come_in_time(monkeypatch):
    """A byte now and then keeps no connection open, also where a request has been answered before."""
    with serving() as served, served.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.settimeout(0.05)

        def is_closed() -> bool:
            """Send a byte, and look."""
            try:
                connection.sendall(b"G")
                return connection.recv(65536) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_until(is_closed, "the connection is closed")


def test_idle_connections_make_room():
    """The oldest goes first; who has a request that is answered stays."""
    engine = FakeEngine(dataclasses.replace(CAPACITY, max_context=10**7), tick=0.02)
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 10**6, "stream": True}).encode()
    with serving(engine, max_connections=8) as served, served.connect() as busy:
        busy.sendall(head(length=len(body)) + body)
        assert engine.busy()
        idle = [served.connect() for _ in range(30)]
        for _ in range(3):
            assert httpx.get(f"{served.url}/health", timeout=LIMIT).status_code == 200
        assert idle[0].recv(1) == b"", "the first of the idle ones is closed"
        assert not engine.cancelled
        for one in idle:
            one.close()
        assert busy.recv(64).startswith(b"HTTP/1.1 200 ")


def test_bodies_are_bounded_together():
    """Each may be short enough, and a thousand that never end would fill the memory."""
    whole = json.dumps({"model": MODEL, "prompt": "x" * 700, "max_tokens": 1}).encode()
    with serving(max_bodies_bytes=1000) as served, served.connect() as connection:
        bodies = served.server._service._bodies
        connection.sendall(head(length=len(whole)) + whole[:600])
        wait_until(lambda: bodies.held == 600, "the first body has begun")
        with served.http() as http:
            headers = {"Content-Type": "application/json"}
            refused = http.post("/v1/completions", content=whole, headers=headers)
            assert refused.status_code == 429
            assert refused.headers["Retry-After"] == "1"
            assert "together have 1000 bytes, which is the limit" in refused.text
            connection.sendall(whole[600:])
            assert connection.recv(64).startswith(b"HTTP/1.1 200 ")
            assert bodies.held == 0, "what is turned into tokens is held no more"
            answered = http.post("/v1/completions", content=whole, headers=headers)
            assert answered.status_code == 200


# ------------------------------------------------------------------------------ a safe start


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        (",", None, "the variable HELIX_API_KEY holds no key."),
        ("", None, "the variable HELIX_API_KEY holds no key."),
        (" , ,", None, "the variable HELIX_API_KEY holds no key."),
        (";", None, "An API key of 1 characters is none that a client can send."),
        (None, b"", "holds no key. Give one or more"),
        (None, b"\n \n\t\n", "holds no key. Give one or more"),
        ("good", b"\xef\xbb\xbf\n", "holds no key. Give one or more"),
        (None, b",\n", "An API key of 1 characters is none that a client can send."),
        (None, b"# the keys of\ngood", "An API key of 13 characters is none that a client"),
        (None, b"caf\xe9", "it is not text in UTF-8. Give one key a line."),
    ],
)
def test_keys_that_are_none(tmp_path, monkeypatch, capsys, key, file, message):
    """Who names a source of keys wants one to be asked for: the server must not be open instead."""
    flags = []
    if key is not None:
        monkeypatch.setenv("HELIX_API_KEY", key)
    if file is not None:
        (tmp_path / "keys").write_bytes(file)
        flags = ["--api-key-file", str(tmp_path / "keys")]
    refused(capsys, flags, message)


def test_keys_of_both_sources(tmp_path, monkeypatch):
    """A list has spaces and empty places; a file has a mark, other line ends and blank lines."""
    monkeypatch.setenv("HELIX_API_KEY", " a1, ,b2,")
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbfc3\r\n\r\nd4")
    flags = ["--load", "x", "--api-key-file", str(tmp_path / "keys")]
    settings = command._settings(command.build_parser().parse_args(flags))
    assert settings.api_keys == ("a1", "b2", "c3", "d4")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "--drain-seconds",
            "nan",
            "--drain-seconds is nan. It must be a finite number of at least 0 and at most",
        ),
        (
            "--drain-seconds",
            "inf",
            "--drain-seconds is inf. It must be a finite number of at least 0 and at most",
        ),
        ("--max-waiting", "-1", "--max-waiting is -1. It must be a whole number of at least 0"),
        (
            "--port",
            "70000",
            "--port is 70000. It must be a whole number of at least 0 and at most 65535",
        ),
        (
            "--body-seconds",
            "1e300",
            "--body-seconds is 1e+300. It must be a finite number above 0 and at most",
        ),
        ("--model-name", "a\nb", r"--model-name is 'a\nb'. It must be a text of one line"),
        (
            "--max-context",
            str(10**12),
            "--max-context is 1000000000000. It must be a whole number of at least 1 and at most 2147483647",
        ),
        (
            "--page-size",
            str(10**12),
            "--page-size is 1000000000000. It must be a whole number of at least 1 and at most",
        ),
        ("--cache-memory", "inf", "--cache-memory is inf. It must be a finite number above 0."),
        ("--cache-memory", "nan", "--cache-memory is nan. It must be a finite number above 0."),
        (
            "--nproc-per-node",
            "0",
            "--nproc-per-node is 0. It must be a whole number of at least 1 and at most 4096",
        ),
        (
            "--nproc-per-node",
            str(10**9),
            "--nproc-per-node is 1000000000. It must be a whole number of at least 1 and",
        ),
    ],
)
def test_numbers_that_cannot_be(capsys, flag, value, message):
    """A sentence, before anything of the model is looked for."""
    refused(capsys, [flag, value], message)


def refused(capsys, flags, message) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--load", "nowhere", *flags])
    assert ended.value.code == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)
