"""The routes: OpenAI's completions, chat and models, health, metrics."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Security
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from helix_megatron.inference.answers import Said, whole
from helix_megatron.inference.request import Engine, Tokens
from helix_megatron.serving.api_errors import encoded, install_error_handlers, unavailable
from helix_megatron.serving.body import read_body, unless_disconnected
from helix_megatron.serving.generation import Plan
from helix_megatron.serving.metrics import Observed
from helix_megatron.serving.openapi import errors, plain_text, publish, request_body, streamed
from helix_megatron.serving.planning import require_model
from helix_megatron.serving.replies import (
    ChatReply,
    CompletionReply,
    DetokenizeReply,
    Health,
    ModelCard,
    ModelList,
    TokenizeReply,
)
from helix_megatron.serving.schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from helix_megatron.serving.service import Service
from helix_megatron.serving.settings import ServerSettings
from helix_megatron.serving.shapes import ChatShape, CompletionShape, Shape
from helix_megatron.serving.streaming import EventStream


def make_app(engine: Engine, tokens: Tokens, settings: ServerSettings) -> FastAPI:
    """The server's application.

    `app.state.service` is its `Service`, with which `Server` stops it.

    Args:
        engine: `submit` and `cancel` are called from the event loop: they must return at once.
        tokens: `encode` and `chat_text` are called from a thread each, decoders from the event loop's.
    """
    service = Service(engine, tokens, settings)
    app = FastAPI(title="Helix", redirect_slashes=False, redoc_url=None)
    app.state.service = service
    app.add_middleware(Observed, metrics=service.metrics)
    app.add_middleware(PlainPaths)
    install_error_handlers(app)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    publish(app, [CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest])
    return app


class PlainPaths:
    """ASGI middleware that takes a path with slashes too many for the one without: clients join them so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = re.sub("/+", "/", scope["path"]).rstrip("/") or "/"
        await self.app(scope, receive, send)


def _key(service: Service) -> list[Any]:
    async def authorised(
        request: Request, _: Annotated[object, Security(HTTPBearer(auto_error=False))]
    ) -> None:
        # async, or each request would have a thread of its own for it, with memory of its own
        service.authorise(request)

    return [Depends(authorised)]


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(
        request: Request,
        model: type[CompletionRequest] | type[ChatRequest],
        shape: Callable[[str], Shape],
    ) -> Response:
        started = time.perf_counter()
        settings = service.settings
        with service.slot() as room:
            body = await read_body(request, settings, room)
            wanted, plan = await unless_disconnected(service.planned(body, model), request.receive)
        submit = functools.partial(service.generation, plan, started)
        speaker = shape(wanted.model)
        if wanted.stream:
            options = wanted.stream_options
            usage = bool(options and options.include_usage)
            return EventStream(submit, speaker, service.metrics, usage, settings.send_seconds)
        collected = _collected(service, plan, started, speaker)
        return await unless_disconnected(collected, request.receive)

    @app.post(
        "/v1/completions",
        response_model=None,
        dependencies=_key(service),
        responses=streamed(CompletionReply) | errors(400, 401, 404, 408, 413, 415, 429, 500, 503),
        openapi_extra=request_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Continue one or more prompts."""
        return await answer(request, CompletionRequest, CompletionShape)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        dependencies=_key(service),
        responses=streamed(ChatReply) | errors(400, 401, 404, 408, 413, 415, 429, 500, 503),
        openapi_extra=request_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await answer(request, ChatRequest, ChatShape)


async def _collected(service: Service, plan: Plan, started: float, shape: Shape) -> Response:
    """Answer with all texts at once, when the last one has ended."""
    with service.generation(plan, started) as generation:
        parts: list[list[Said]] = [[] for _ in generation.choices]
        while generation.open:
            for choice, said in await generation.pieces():
                parts[choice.index].append(said)
        ended = [
            (whole(parts[choice.index]), choice.reason, choice.take_entries())
            for choice in generation.best()
            if choice.reason is not None
        ]
        reply = shape.reply(ended, generation.usage())
    return Response(encoded(reply), media_type="application/json")


def _add_tokens(app: FastAPI, service: Service) -> None:
    codes = errors(400, 401, 404, 408, 413, 415, 429, 500, 503)

    @app.post(
        "/tokenize",
        dependencies=_key(service),
        responses=codes,
        openapi_extra=request_body(TokenizeRequest),
    )
    async def tokenize(request: Request) -> TokenizeReply:
        """The tokens of a text or a conversation, as the model would be given them."""
        with service.slot() as room:
            body = await read_body(request, service.settings, room)
            return await unless_disconnected(service.tokenized(body), request.receive)

    @app.post(
        "/detokenize",
        dependencies=_key(service),
        responses=codes,
        openapi_extra=request_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> DetokenizeReply:
        """The text of tokens."""
        with service.slot() as room:
            body = await read_body(request, service.settings, room)
            return await unless_disconnected(service.detokenized(body), request.receive)


def _add_models(app: FastAPI, service: Service) -> None:
    card = ModelCard(
        id=service.settings.model_name,
        created=service.created,
        max_model_len=service.engine.capacity.max_context,
    )

    @app.get("/v1/models", dependencies=_key(service), responses=errors(401, 500))
    async def models() -> ModelList:
        """List the one model that this server has."""
        return ModelList(data=[card])

    # Names of models contain slashes.
    @app.get("/v1/models/{model:path}", dependencies=_key(service), responses=errors(401, 404, 500))
    async def model_card(model: str) -> ModelCard:
        """Tell of the model by its name."""
        require_model(model, service.settings)
        return card


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=errors(500, 503))
    async def health() -> Health:
        """Whether requests are taken. It never asks for a key."""
        if service.trouble:
            raise unavailable(service.trouble)
        reason = service.chat_trouble or None
        return Health(status="degraded" if reason else "ok", reason=reason)

    protection = service.settings.protect_metrics

    @app.get(
        "/metrics",
        response_model=None,
        dependencies=_key(service) if protection else [],
        responses=plain_text() | errors(*([401] if protection else []), 500),
        response_class=Response,
    )
    async def metrics() -> Response:
        """The server's metrics in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
