"""What the routes share: the engine, its worker thread for text, and the responses that are open."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from helix_megatron.errors import HelixError
from helix_megatron.inference.answers import AnswerParser
from helix_megatron.inference.request import Engine, TemplateLimitError, Tokens
from helix_megatron.serving.api_errors import ApiError, too_many, unavailable
from helix_megatron.serving.body import Bodies, Room
from helix_megatron.serving.generation import Generation, Plan
from helix_megatron.serving.grammars import Grammars
from helix_megatron.serving.mailbox import Mailbox
from helix_megatron.serving.messages import Message
from helix_megatron.serving.metrics import Metrics
from helix_megatron.serving.planning import check, check_size, plan, require_model
from helix_megatron.serving.replies import DetokenizeReply, TokenizeReply
from helix_megatron.serving.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
    parse,
)
from helix_megatron.serving.settings import ServerSettings

Result = TypeVar("Result")

STOPPING = "it is stopping."


class Service:
    """One model behind HTTP. Everything but `announce_stop` belongs to the event loop's thread."""

    def __init__(self, engine: Engine, tokens: Tokens, settings: ServerSettings) -> None:
        self.engine = engine
        self.tokens = tokens
        self.settings = settings
        self.metrics = Metrics(engine)
        self.grammars = Grammars(tokens, engine.capacity.vocab_size)
        self.created = int(time.time())
        # One thread: not all tokenisers may be called from several at once. Chat templates are not to be relied
        # upon to end, so they do not keep what needs none waiting.
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="helix-texts")
        self._templates = ThreadPoolExecutor(1, thread_name_prefix="helix-templates")
        self.chat_trouble = ""  # why the last conversation could not be turned into text in time
        self._generations: set[Generation] = set()
        self._reading = 0
        self._bodies = Bodies(settings.max_bodies_bytes)
        self._mailbox: Mailbox | None = None
        self._planning: set[asyncio.Task[object]] = set()
        self._stopping = self._aborting = False

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
        """End the requests that are read and the responses that are open with an error."""
        self._aborting = True
        for task in self._planning:
            task.cancel()
        for generation in self._generations:
            generation.abort(unavailable(STOPPING))

    def authorise(self, request: Request) -> None:
        """Refuse a request without a valid key.

        Raises:
            ApiError: 401.
        """
        check_key(self.settings.api_keys, request)

    @contextlib.contextmanager
    def slot(self) -> Iterator[Room]:
        """A place among the requests that are read or answered, with room for its body.

        Raises:
            ApiError: 429 if there is none, 503 if the server takes no requests.
        """
        if self.trouble:
            raise unavailable(self.trouble)
        limit = self.settings.max_open_requests
        if self._reading + len(self._generations) >= limit:
            raise too_many(f"{limit} requests are open, which is the limit. Try again later.")
        self._reading += 1
        room = Room(self._bodies)
        try:
            yield room
        finally:
            self._reading -= 1
            room.leave()

    async def planned(self, body: bytes, model: type[Body]) -> tuple[Body, Plan]:
        """Parse and tokenise outside of the event loop, text after text: others have their turn in between.

        Raises:
            ApiError: 400 or 404.
        """
        task = asyncio.current_task()
        assert task is not None
        self._planning.add(task)
        try:
            capacity = self.engine.capacity
            request = await _in_thread(self._texts, parse, body, model, capacity.max_context)
            check(request, capacity, self.settings)
            answers = await self._answers(request)
            wanted, begin = await self._wanted(request)
            prompts = [
                await _in_thread(self._texts, self.tokens.encode, one, begin)
                if isinstance(one, str)
                else one
                for one in wanted
            ]
            echoes = []
            if isinstance(request, CompletionRequest) and request.echo:
                echoes = [
                    one if isinstance(one, str) else await _in_thread(self._texts, self._text, one)
                    for one in wanted
                ]
            constraint = None
            wanted_json = request.response_format and request.response_format.schema_of_json
            if wanted_json is not None:
                constraint = await _in_thread(self._texts, self.grammars.constraint, wanted_json)
            stops = self.tokens.stop_tokens
            answer = partial(answers, str(wanted[0])) if answers else None
            return request, plan(request, prompts, stops, capacity, echoes, constraint, answer)
        except asyncio.CancelledError:
            if self._aborting:
                raise unavailable(STOPPING) from None
            raise
        finally:
            self._planning.discard(task)

    async def _wanted(self, request: GenerationRequest) -> tuple[Sequence[str | list[int]], bool]:
        """Texts or token ids, and whether the model's first tokens are to come in front of texts."""
        if isinstance(request, CompletionRequest):
            return request.prompts, True
        assert isinstance(request, ChatRequest)
        return [await self._conversation(request.messages, request.told_tools)], False

    async def _answers(self, request: GenerationRequest) -> Callable[[str], AnswerParser] | None:
        """What makes parsers of answers that may call tools; None for others."""
        if not isinstance(request, ChatRequest) or not request.tools:
            return None
        try:
            return await _in_thread(self._texts, self.tokens.answers, request.told_tools)
        except ApiError as error:
            raise ApiError(400, f"tools cannot be used: {error}", param="tools") from None

    async def _conversation(
        self, turns: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """The text of a conversation."""
        messages = [message.plain() for message in turns]
        characters = sum(len(one["content"]) for one in messages) + sum(
            len(str(tool)) for tool in tools
        )
        check_size(characters, self.engine.capacity, "messages")
        text = await _in_thread(self._templates, self._chat_text, messages, tools)
        check_size(len(text), self.engine.capacity, "messages")
        return text

    async def tokenized(self, body: bytes) -> TokenizeReply:
        """The answer to a body of `/tokenize`.

        Raises:
            ApiError: 400 or 404.
        """
        capacity = self.engine.capacity
        request = await _in_thread(self._texts, parse, body, TokenizeRequest, capacity.max_context)
        self._require_model(request.model)
        begin = request.add_special_tokens is not False
        if request.messages is not None:
            text, begin = await self._conversation(request.messages), False
        else:
            text = request.prompt or ""
            check_size(len(text), capacity, "prompt")
        tokens = await _in_thread(self._texts, self.tokens.encode, text, begin)
        texts = [self.tokens.token_text(token)[0] for token in tokens]
        return TokenizeReply(
            count=len(tokens),
            max_model_len=capacity.max_context,
            tokens=tokens,
            token_strs=texts if request.return_token_strs else None,
        )

    async def detokenized(self, body: bytes) -> DetokenizeReply:
        """The answer to a body of `/detokenize`.

        Raises:
            ApiError: 400 or 404.
        """
        capacity = self.engine.capacity
        request = await _in_thread(
            self._texts, parse, body, DetokenizeRequest, capacity.max_context
        )
        self._require_model(request.model)
        return DetokenizeReply(prompt=await _in_thread(self._texts, self._text, request.tokens))

    def _require_model(self, name: str | None) -> None:
        if name is not None:
            require_model(name, self.settings)

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of tokens.

        Raises:
            HelixError: there is no such token.
        """
        most = self.engine.capacity.vocab_size
        wrong = next((token for token in tokens if token >= most), None)
        if wrong is not None:
            raise HelixError(f"token {wrong} does not exist. Valid tokens: 0 to {most - 1}.")
        stream = self.tokens.decoder()
        return stream.add(tokens) + stream.finish()

    def _chat_text(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> str:
        try:
            text = self.tokens.chat_text(messages, tools)
        except TemplateLimitError as error:
            self.chat_trouble = str(error)
            raise
        self.chat_trouble = ""
        return text

    def close(self) -> None:
        """End the work on texts, when nobody waits for it any more. May be called from any thread."""
        self.tokens.close()
        for executor in (self._texts, self._templates):
            executor.shutdown(wait=False, cancel_futures=True)

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
        generation = Generation(*arguments)
        self._generations.add(generation)
        try:
            yield generation
        finally:
            self._generations.discard(generation)
            generation.close()


def check_key(keys: Sequence[str], request: Request) -> None:
    """Compare the key in constant time, so that its characters cannot be found one by one.

    Args:
        keys: the valid ones; without any, none is asked for.

    Raises:
        ApiError: 401.
    """
    if not keys:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    given = key.strip().encode("latin-1", "replace")
    known = [hmac.compare_digest(given, valid.encode()) for valid in keys]
    if scheme.lower() != "bearer" or not any(known):
        what = "wrong" if key else "missing"
        raise ApiError(
            401,
            f"The API key is {what}. Send the header: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


async def _in_thread(executor: Executor, work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `work` in a thread of an executor; what is the client's mistake as an `ApiError`."""
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, work, *arguments)
    except HelixError as error:
        raise ApiError(400, str(error)) from None
