"""Reading a request's body: bounded in size and time, and noticing that the client went away."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from helix_megatron.serving.api_errors import ApiError, too_many
from helix_megatron.serving.settings import ServerSettings

Result = TypeVar("Result")

# A client that still sends does not read the answer, and loses it when the connection is reset: so the rest of
# a body that is too large is read, within bounds, and thrown away.
DISCARD_FACTOR = 8
CLOSE = {"Connection": "close"}  # what remains of the body must not be taken for the next request


@dataclass
class Bodies:
    """The bytes of all bodies that have come and are not yet turned into tokens; `limit` are the most."""

    limit: int
    held: int = 0


class Room:
    """What one request holds of them."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held = 0

    def take(self, size: int) -> None:
        """Hold so many bytes more.

        Raises:
            ApiError: 429, there is no room for them beside those of all other requests.
        """
        if self._bodies.held + size > self._bodies.limit:
            error = too_many(
                f"The bodies of all requests together have {self._bodies.limit} bytes, which is the limit. "
                "Try again later, or send less in a request."
            )
            error.headers |= CLOSE
            raise error
        self._bodies.held += size
        self._held += size

    def leave(self) -> None:
        """Hold nothing any more."""
        self._bodies.held -= self._held
        self._held = 0


async def read_body(request: Request, settings: ServerSettings, room: Room) -> bytes:
    """The whole body, at most `max_body_bytes`.

    Raises:
        ApiError: 408, 413, 415 or 429.
        ClientDisconnect: the client went away.
    """
    # A page of another origin can make a browser send a body without a type, or with one of a form.
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(415, f"Content-Type is {media_type[:80]!r}. Valid: application/json.")
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise ApiError(415, f"Content-Encoding is {coding[:80]!r}. Valid: leave it out.")
    limit = settings.max_body_bytes
    if "expect" in request.headers and _declared(request) > limit:
        raise _too_large(limit)  # the client waits for leave to send
    body = bytearray()
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in _chunks(request.receive):
                size += len(chunk)
                if size <= limit:
                    room.take(len(chunk))
                    body += chunk
                elif size > DISCARD_FACTOR * limit:
                    break
                else:
                    body.clear()
                    room.leave()
            if size <= limit:
                return bytes(body).removeprefix(codecs.BOM_UTF8)
    if size > limit:
        raise _too_large(limit)
    raise ApiError(
        408,
        f"The body did not arrive within {settings.body_seconds:g} s: {size} bytes did.",
        headers=CLOSE,
    )


def _declared(request: Request) -> int:
    """The length of the body as the client says."""
    length = request.headers.get("content-length", "0")
    # Python refuses to read numbers of thousands of digits.
    return int(length[:18]) if length.isdecimal() else 0


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        more = message.get("more_body", False)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"The body is larger than {limit} bytes, which is the limit. Try fewer prompts in a request.",
        headers=CLOSE,
    )


async def unless_disconnected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of `work`, which is cancelled when the client goes away.

    Args:
        receive: of a request whose body has been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
