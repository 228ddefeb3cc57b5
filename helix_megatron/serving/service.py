"""What the routes share: the engine, its worker thread for text, and the responses that are open."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from helix_megatron.errors import HelixError
from helix_megatron.inference.request import Engine, Tokens
from helix_megatron.serving.api_errors import ApiError, too_many, unavailable
from helix_megatron.serving.generation import Generation, Plan
from helix_megatron.serving.mailbox import Mailbox
from helix_megatron.serving.metrics import Metrics
from helix_megatron.serving.planning import plan
from helix_megatron.serving.schema import Body, ChatRequest, CompletionRequest, parse
from helix_megatron.serving.settings import ServerSettings

STOPPING = "it is stopping."


class Service:
    """One model behind HTTP. Everything but `announce_stop` belongs to the event loop's thread."""

    def __init__(self, engine: Engine, tokens: Tokens, settings: ServerSettings) -> None:
        self.engine = engine
        self.tokens = tokens
        self.settings = settings
        self.metrics = Metrics(engine)
        self.created = int(time.time())
        # One thread: not all tokenisers may be called from several at once.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="helix-tokens")
        self._keys = [key.encode() for key in settings.api_keys]
        self._generations: set[Generation] = set()
        self._reading = 0
        self._mailbox: Mailbox | None = None
        self._stopping = False

    @property
    def trouble(self) -> str:
        """Why it takes no requests; empty while it does."""
        if self.engine.failure:
            return self.engine.failure
        return STOPPING if self._stopping else ""

    def announce_stop(self) -> None:
        """Refuse new requests from now on; those that are open go on. May be called from a signal handler."""
        self._stopping = True

    def abort(self) -> None:
        """End the responses that are open with an error."""
        for generation in self._generations:
            generation.abort(unavailable(STOPPING))

    def authorise(self, request: Request) -> None:
        """Compare the key in constant time, so that its characters cannot be found one by one.

        Raises:
            ApiError: 401.
        """
        if not self._keys:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        known = [hmac.compare_digest(given, valid) for valid in self._keys]
        if scheme.lower() != "bearer" or not any(known):
            what = "wrong" if key else "missing"
            raise ApiError(
                401,
                f"The API key is {what}. Send the header: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """A place among the requests that are read or answered.

        Raises:
            ApiError: 429 if there is none, 503 if the server takes no requests.
        """
        if self.trouble:
            raise unavailable(self.trouble)
        limit = self.settings.max_open_requests
        if self._reading + len(self._generations) >= limit:
            raise too_many(f"{limit} requests are open, which is the limit. Try again later.")
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def planned(self, body: bytes, model: type[Body]) -> tuple[Body, Plan]:
        """Parse and tokenise in the worker thread: streams go on while a long text is read.

        Raises:
            ApiError: 400 or 404.
        """

        def work() -> tuple[Body, Plan]:
            request = parse(body, model)
            assert isinstance(request, CompletionRequest | ChatRequest)
            try:
                return request, plan(request, self.tokens, self.engine.capacity, self.settings)
            except HelixError as error:
                raise ApiError(400, str(error)) from None

        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    @contextlib.contextmanager
    def generation(self, wanted: Plan, started: float) -> Iterator[Generation]:
        """Submit, and cancel what is not finished on the way out.

        Args:
            started: when the HTTP request came, in `time.perf_counter` seconds.

        Raises:
            ApiError: the engine refuses.
        """
        if self.trouble:
            raise unavailable(self.trouble)
        loop = asyncio.get_running_loop()
        if self._mailbox is None or self._mailbox.loop is not loop:
            self._mailbox = Mailbox(loop)
        arguments = self.engine, self.tokens, self._mailbox, self.metrics, wanted, started
        with Generation(*arguments) as generation:
            self._generations.add(generation)
            try:
                yield generation
            finally:
                self._generations.discard(generation)
