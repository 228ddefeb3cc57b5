"""The HTTP server in a thread of its own: the main thread is the engine's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import threading
import time

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from helix_megatron.errors import HelixError
from helix_megatron.serving.service import Service

logger = logging.getLogger(__name__)

START_SECONDS = 300.0  # only ends a hang
KEEP_ALIVE_SECONDS = 30  # for a connection without requests
HEADER_SECONDS = 60.0  # as long as a body may take
# After the responses that are open were told to end: to send that, before connections are cut.
FAREWELL_SECONDS = 3.0


class Server:
    """Serves an application of `make_app` until `stop`.

    Args:
        listener: of `listen`.
        max_connections: open at the same time; one more gets 503.
    """

    def __init__(self, app: FastAPI, listener: socket.socket, max_connections: int = 2048) -> None:
        self._service: Service = app.state.service
        self._socket = listener
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="helix-http", daemon=True)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                http=PatientProtocol,  # whose parser, h11, refuses endless headers
                limit_concurrency=max_connections,
                access_log=False,
                log_config=None,  # logging is the program's business
                lifespan="off",
                ws="none",
                proxy_headers=False,  # nothing depends on the client's address
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )

    def start(self) -> int:
        """Answer requests; the port.

        Raises:
            HelixError: the server ended at once.
        """
        port = int(self._socket.getsockname()[1])
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._uvicorn.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._socket.close()
                raise HelixError(
                    f"The HTTP server did not start: {self._failure or 'no answer'}."
                ) from self._failure
            time.sleep(0.005)
        return port

    def announce_stop(self) -> None:
        """Answer `/health` and new requests with 503; go on with those that are open.

        For the time in which the engine finishes. May be called from a signal handler.
        """
        self._service.announce_stop()

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more connections, let open responses finish, then end them with an error."""
        self._service.announce_stop()
        if not self._thread.is_alive():
            return
        # The last resort is uvicorn's: it cancels what did not end when it was told to.
        limit = drain_seconds + FAREWELL_SECONDS
        self._uvicorn.config.timeout_graceful_shutdown = limit  # type: ignore[assignment]
        self._uvicorn.should_exit = True
        self._thread.join(drain_seconds)
        if self._thread.is_alive() and self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.abort)
        self._thread.join(FAREWELL_SECONDS + 1)
        self._service.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._uvicorn.serve([self._socket])

        try:
            # Not uvicorn.Server.run: the loop is needed here, to end responses.
            # Releases of uvicorn that do not choose a loop in this way get asyncio's.
            choose = getattr(self._uvicorn.config, "get_loop_factory", lambda: None)
            with asyncio.Runner(loop_factory=choose()) as runner:
                runner.run(serve())
        except BaseException as error:
            self._failure = error
            if self._uvicorn.started:  # else `start` raises it
                logger.exception("the HTTP server ended")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose clients have some seconds for a whole header, each time.

    Where connections are too many, who has been waiting for a request the longest makes room.
    """

    _late: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if (
            self.limit_concurrency is not None
            and len(self.connections) + 1 >= self.limit_concurrency
        ):
            protocols = [one for one in self.connections if isinstance(one, PatientProtocol)]
            waiting = [one for one in protocols if one._is_waiting]
            if waiting:
                oldest = min(waiting, key=lambda one: one._since)
                self.connections.discard(oldest)
                oldest.transport.abort()
        super().connection_made(transport)
        self._await_header()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    @property
    def _is_waiting(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await_header(self) -> None:
        self._cancel()
        self._since = self.loop.time()
        self._late = self.loop.call_later(HEADER_SECONDS, self._close_if_waiting)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()

    def _close_if_waiting(self) -> None:
        if self._is_waiting:
            self.transport.close()


def allow_many_connections() -> None:
    """Raise this process's limit of open files as far as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Args:
        host: `0.0.0.0` or `::` for all of this machine's.
        port: 0 takes a free one.

    Raises:
        HelixError: the port is taken or not permitted, or the host is not of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise HelixError(
            f"The host {host!r} is not known: {error}. Try 127.0.0.1, or 0.0.0.0 for all interfaces."
        ) from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Here, not in uvicorn: only now another program's listening at this port is an error.
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise HelixError(
            f"Cannot listen on {host} port {port}: {error.strerror}. Try another port, or 0 for a free one; "
            f"the host must be an address of this machine, or 0.0.0.0 for all."
        ) from error
    return listener
