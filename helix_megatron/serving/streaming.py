"""Responses that come as server-sent events: `data: {…}` for each, `data: [DONE]` at the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helix_megatron.serving.api_errors import ApiError, encoded, mistake
from helix_megatron.serving.body import unless_disconnected
from helix_megatron.serving.generation import Generation
from helix_megatron.serving.metrics import Metrics
from helix_megatron.serving.shapes import Shape

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Submits a generation, and sends its text as it comes.

    It submits when it is sent, so that there is no moment at which sequences run and nobody would cancel them.
    What the engine refuses is still an ordinary error, since nothing was sent before.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        submit: Callable[[], AbstractContextManager[Generation]],
        shape: Shape,
        metrics: Metrics,
        include_usage: bool,
        send_seconds: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._submit = submit
        self._shape = shape
        self._metrics = metrics
        self._include_usage = include_usage
        self._send_seconds = send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._submit() as generation:
            try:
                await unless_disconnected(self._send(generation, send), receive)
            except ClientDisconnect:
                logger.debug("a client went away from a stream")

    async def _send(self, generation: Generation, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(body: bytes, more: bool = True) -> None:
            try:
                async with asyncio.timeout(self._send_seconds):
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            except (
                TimeoutError
            ):  # connected, and not reading: its sequences and its place are freed
                raise ClientDisconnect from None

        try:
            openings = (self._shape.opening(choice.index) for choice in generation.choices)
            if first := b"".join(event(chunk) for chunk in openings if chunk is not None):
                await write(first)
            while generation.open:
                news = b"".join(
                    event(self._shape.chunk(choice.index, said, choice.reason, entries))
                    for choice, said in await generation.pieces()
                    if (entries := choice.take_entries()) or said or choice.reason is not None
                )
                if news:
                    await write(news)
            last = b""
            if self._include_usage:
                last = event(self._shape.usage_chunk(generation.usage()))
            await write(last + DONE, more=False)
        except ApiError as error:
            self._metrics.failed_streams.inc()
            await write(event(error.reply()), more=False)
        except ClientDisconnect:
            raise
        except Exception:
            logger.exception("a stream failed")
            self._metrics.failed_streams.inc()
            await write(event(mistake().reply()), more=False)


def event(chunk: BaseModel) -> bytes:
    return b"data: " + encoded(chunk) + b"\n\n"
