"""An engine without a model, and tokens that are bytes: for tests of the server."""

from __future__ import annotations

import contextlib
import socket
import threading
import unittest.mock
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from fastapi import FastAPI
from waiting import LIMIT

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import (
    Capacity,
    Output,
    QueueFullError,
    Request,
    Stats,
    StoppingError,
    TokenLogprobs,
)
from helix_megatron.inference.token_streams import ByteStream
from helix_megatron.inference.tokens import ByteTokens
from helix_megatron.serving import server as server_module
from helix_megatron.serving.app import make_app
from helix_megatron.serving.server import Server, listen
from helix_megatron.serving.settings import ServerSettings

MODEL = "org/model"
END = 256  # the only token that is not a byte
CAPACITY = Capacity(vocab_size=257, max_context=2048, max_sequences=256, max_waiting=1024)


class FakeTokens(ByteTokens):
    """Bytes, and conversations whose text is the last message: tests can say what is echoed."""

    def __init__(self) -> None:
        super().__init__(END + 1)

    def chat_text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()) -> str:
        if messages[-1]["role"] not in ("user", "tool"):
            raise HelixError("The last message is not the user's. Valid: a conversation that asks.")
        return str(messages[-1]["content"])

    def decoder(self, after: Sequence[int] = (), special: bool = False) -> ByteStream:
        return FakeTextStream()


class FakeTextStream(ByteStream):
    """The stop token has a text, too, which must not be seen."""

    def add(self, tokens: Sequence[int]) -> str:
        return super().add([*b"".join(b"<end>" if t == END else bytes([t]) for t in tokens)])


def echo(request: Request) -> Iterator[int]:
    """The prompt, again and again."""
    while True:
        yield from request.prompt


def until_set(event: threading.Event) -> Callable[[Request], Iterator[int]]:
    """A script that goes on until the event is set: tests say when a text ends."""

    def script(request: Request) -> Iterator[int]:
        while not event.is_set():
            yield ord("a")
        while True:
            yield END

    return script


class FakeEngine:
    """Emits one token of each sequence at each tick, from a thread of its own.

    Args:
        capacity: as a real engine has it.
        tick: seconds between tokens; 0 yields to other threads only.
        script: the tokens of a request, endlessly.
        start_at: sequences that must have come before the first token: so many do run at once.
    """

    def __init__(
        self,
        capacity: Capacity = CAPACITY,
        tick: float = 0.0,
        script: Callable[[Request], Iterator[int]] = echo,
        start_at: int = 1,
    ) -> None:
        self.capacity = capacity
        self.tick = tick
        self.submitted: list[Request] = []
        self.cancelled: list[Request] = []
        self.most_running = 0
        self._script = script
        self._start_at = start_at
        self._failure = ""
        self._stopping = False
        self._running: dict[Request, tuple[Iterator[int], int]] = {}
        self._waiting: deque[Request] = deque()
        self._generated = 0
        self._steps = 0
        self._changed = threading.Condition()  # of a reentrant lock: scripts may call back
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        with self._changed:
            if self._stopping or self._failure:
                raise StoppingError(self._failure or "the engine is stopping.")
            for request in requests:
                if not request.prompt:
                    raise HelixError("The prompt is empty. Valid: at least one token.")
                if max(request.prompt) >= self.capacity.vocab_size:
                    raise HelixError(
                        f"Token {max(request.prompt)} does not exist. Valid: 0 to "
                        f"{self.capacity.vocab_size - 1}."
                    )
                if len(request.prompt) + request.sampling.max_tokens > self.capacity.max_context:
                    raise HelixError("The server should have refused this context.")
            free = self.capacity.max_sequences - len(self._running) + self.capacity.max_waiting
            if len(requests) > free - len(self._waiting):
                raise QueueFullError(f"{len(self._waiting)} requests wait. Try again later.")
            self._waiting.extend(requests)
            self.submitted.extend(requests)
            self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
            elif self._running.pop(request, None) is None:
                return
            self.cancelled.append(request)
            self._changed.notify_all()
        request.listener(Output(reason="cancelled"))

    def stats(self) -> Stats:
        with self._changed:
            return Stats(
                running=len(self._running),
                waiting=len(self._waiting),
                pages_used=len(self._running),
                pages_total=self.capacity.max_sequences,
                generated_tokens=self._generated,
                steps=self._steps,
            )

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    @property
    def failure(self) -> str:
        return self._failure

    def fail(self, reason: str) -> None:
        """As an engine fails: every sequence hears of it."""
        with self._changed:
            self._failure = reason
            requests = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self._changed.notify_all()
        for request in requests:
            request.listener(Output(reason="error", error=reason))

    def lose(self, request: Request, reason: str) -> None:
        """One sequence fails. May be called from a script."""
        with self._changed:
            self._running.pop(request, None)
            self._changed.notify_all()
        request.listener(Output(reason="error", error=reason))

    def idle(self, seconds: float = LIMIT) -> bool:
        """Wait until no sequence is left; whether that came true."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._running and not self._waiting, timeout=seconds
            )

    def busy(self, count: int = 1, seconds: float = LIMIT) -> bool:
        """Wait until so many sequences run; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._running) >= count, timeout=seconds)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        ((self._running or self._waiting) and len(self.submitted) >= self._start_at)
                        or self._stopping
                        or self._failure
                    )
                )
                if self._failure or (self._stopping and not self._running and not self._waiting):
                    return
                while self._waiting and len(self._running) < self.capacity.max_sequences:
                    request = self._waiting.popleft()
                    self._running[request] = (self._script(request), 0)
                self.most_running = max(self.most_running, len(self._running))
                self._changed.notify_all()
                news = [(request, self._step(request)) for request in list(self._running)]
                self._steps += 1
                # Inside the lock, so that nothing is heard after `cancelled`.
                for request, output in news:
                    if output is not None:
                        request.listener(output)
            threading.Event().wait(self.tick)

    def _step(self, request: Request) -> Output | None:
        """The next token; None if the sequence was lost."""
        tokens, count = self._running[request]
        token = next(tokens)
        if request not in self._running:
            return None
        self._generated += 1
        reason = None
        if token in request.sampling.stop_tokens:
            reason = "stop"
        elif count + 1 == request.sampling.max_tokens:
            reason = "length"
        sampling, prompt = request.sampling, request.prompt
        output = Output(
            (token,),
            reason,
            logprobs=() if sampling.logprobs is None else (logprobs(token, sampling.logprobs),),
            prompt_logprobs=()
            if count or sampling.prompt_logprobs is None
            else tuple(logprobs(one, sampling.prompt_logprobs) for one in prompt[1:]),
            shared=0 if count else len(prompt) // 4,
        )
        if reason is None:
            self._running[request] = (tokens, count + 1)
        else:
            del self._running[request]
            self._changed.notify_all()
        return output


def logprobs(token: int, top: int) -> TokenLogprobs:
    """Made up: a token is likelier the smaller it is, and the likeliest tokens are the first letters."""
    return TokenLogprobs(token, -token / 100, tuple((97 + n, -(97 + n) / 100) for n in range(top)))


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    engine: FakeEngine
    server: Server
    url: str

    def openai(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, without retries: tests must see the first error."""
        options = {"api_key": "none", "max_retries": 0, "timeout": LIMIT, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def connect(self) -> socket.socket:
        """A connection without a client's manners."""
        port = int(self.url.rsplit(":")[-1])
        return socket.create_connection(("127.0.0.1", port), timeout=LIMIT)

    def http(self, **options: Any) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=LIMIT, **options)


@contextlib.contextmanager
def serving(
    engine: FakeEngine | None = None,
    tokens: FakeTokens | None = None,
    max_connections: int = 2048,
    **settings: Any,
) -> Iterator[Served]:
    """A real server at a free port. The model's name is `org/model`. It waits longer than a test does."""
    engine = engine or FakeEngine()
    patience = {"body_seconds": LIMIT, "send_seconds": LIMIT}
    settings = {"model_name": MODEL, **patience, **settings}
    server_limits = dict.fromkeys(["START_SECONDS", "HEADER_SECONDS", "FAREWELL_SECONDS"], LIMIT)
    with unittest.mock.patch.multiple(server_module, **server_limits):
        app = make_app(engine, tokens or FakeTokens(), ServerSettings(**settings))
        server = Server(app, listen("127.0.0.1", 0), max_connections)
        port = server.start()
        try:
            yield Served(engine, server, f"http://127.0.0.1:{port}")
        finally:
            server.stop()
            engine.stop()


def head(path: str = "completions", length: int | None = None) -> bytes:
    """The header of a request, whose body comes in chunks if it has no length."""
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    content = f"Host: x\r\nContent-Type: application/json\r\n{body}\r\n\r\n"
    return f"POST /v1/{path} HTTP/1.1\r\n{content}".encode()


async def post(app: FastAPI, path: str, body: bytes, strict: bool = True) -> tuple[int, bytes]:
    """Status and body of a response, straight from the application: no sockets, hence fast.

    What the application raises is raised here, unless not `strict`.
    """
    transport = httpx.ASGITransport(app, raise_app_exceptions=strict)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {"Content-Type": "application/json"}
        response = await client.post(path, content=body, headers=headers)
    return response.status_code, response.content
