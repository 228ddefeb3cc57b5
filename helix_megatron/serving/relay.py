"""Passing a request on to a replica, and its response back as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from helix_megatron.serving.api_errors import ApiError, unavailable
from helix_megatron.serving.body import unless_disconnected
from helix_megatron.serving.replicas import Replica
from helix_megatron.serving.streaming import event

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
BLOCK = 65536
# What belongs to one connection, or is said anew.
OF_A_CONNECTION = {
    b"connection",
    b"content-length",
    b"expect",
    b"host",
    b"keep-alive",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
GONE = "the replica that answered is gone."


class Relayed(Response):
    """The response of the first of some replicas that can be reached.

    It is asked when the response is sent. A replica that cannot be reached got nothing, so the next one is
    tried. One that is lost on the way ends the response: with an error where nothing has been sent, with an
    event in a stream of events, else with the connection.
    """

    def __init__(self, replicas: Sequence[Replica], request: Request, body: bytes) -> None:
        super().__init__()
        self._replicas, self._request, self._body = replicas, request, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for replica in self._replicas:
            try:
                streams = await asyncio.open_connection(HOST, replica.port)
            except OSError as error:
                replica.trouble = f"it cannot be reached: {error.strerror}."
                continue
            replica.open += 1
            try:
                exchange = Exchange(replica, *streams, send)
                work = exchange.run(self._request, self._body)
                await unless_disconnected(work, receive)
            except ClientDisconnect:
                logger.debug("a client went away")
            finally:
                replica.open -= 1
                streams[1].close()
                with contextlib.suppress(OSError):
                    await streams[1].wait_closed()
            return
        await unavailable("no replica can be reached.").response()(scope, receive, send)


class Exchange:
    """One request to one replica over a connection of its own."""

    def __init__(
        self,
        replica: Replica,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        send: Send,
    ) -> None:
        self._replica, self._reader, self._writer, self._send = replica, reader, writer, send
        self._connection = h11.Connection(h11.CLIENT)
        self._started = self._events = False

    async def run(self, request: Request, body: bytes) -> None:
        """Send the request, and pass the response on."""
        try:
            await self._ask(request, body)
            while (found := await self._next()) is not None:
                await self._pass_on(found)
            await self._finish(b"")
            self._replica.answered += 1
        except (OSError, h11.RemoteProtocolError):
            self._replica.lost += 1
            logger.warning("replica %d is gone in the middle of a response", self._replica.number)
            await self._end_with(unavailable(GONE))

    async def _ask(self, request: Request, body: bytes) -> None:
        headers = [(k, v) for k, v in request.headers.raw if k.lower() not in OF_A_CONNECTION]
        headers += [(b"Host", HOST.encode()), (b"Connection", b"close")]
        if request.method == "POST":
            headers.append((b"Content-Length", str(len(body)).encode()))
        target = request.scope["raw_path"].partition(b"?")[0] or b"/"
        if query := request.scope["query_string"]:
            target += b"?" + query
        asked = h11.Request(method=request.method.encode(), target=target, headers=headers)
        for sent in (asked, *([h11.Data(body)] if body else []), h11.EndOfMessage()):
            self._writer.write(self._connection.send(sent) or b"")
        await self._writer.drain()

    async def _next(self) -> h11.Event | None:
        """The next part of the response; None at its end."""
        while True:
            found = self._connection.next_event()
            if found is h11.NEED_DATA:
                self._connection.receive_data(await self._reader.read(BLOCK))
            elif isinstance(found, h11.EndOfMessage):
                return None
            elif not isinstance(found, h11.InformationalResponse):
                assert isinstance(found, h11.Event)
                return found

    async def _pass_on(self, found: h11.Event) -> None:
        if isinstance(found, h11.Response):
            length = b"content-length"
            headers = [(k, v) for k, v in found.headers if k not in OF_A_CONNECTION - {length}]
            self._events = (b"content-type", b"text/event-stream") in [
                (name, value.partition(b";")[0]) for name, value in headers
            ]
            await self._send(
                {"type": "http.response.start", "status": found.status_code, "headers": headers}
            )
            self._started = True
        elif isinstance(found, h11.Data):
            data = bytes(found.data)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def _end_with(self, error: ApiError) -> None:
        if not self._started:
            response = error.response()
            await self._send(
                {
                    "type": "http.response.start",
                    "status": error.status,
                    "headers": response.raw_headers,
                }
            )
            await self._finish(response.body)
        elif self._events:
            await self._finish(event(error.reply()))
        else:
            raise ConnectionError(GONE)  # the client sees that the response is not complete

    async def _finish(self, data: bytes | memoryview) -> None:
        await self._send({"type": "http.response.body", "body": bytes(data), "more_body": False})
