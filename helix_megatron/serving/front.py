"""One endpoint in front of several replicas: a request goes to one of them, and the health of each is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from helix_megatron.serving.api_errors import install_error_handlers, too_many, unavailable
from helix_megatron.serving.body import Bodies, Room, read_body
from helix_megatron.serving.relay import Relayed
from helix_megatron.serving.replicas import Replica, Replicas, beginning_of
from helix_megatron.serving.replies import Health
from helix_megatron.serving.service import STOPPING, check_key
from helix_megatron.serving.settings import ServerSettings

METHODS = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]


class FrontService:
    """What `Server` needs of an application: see `helix_megatron.serving.service.Service`."""

    def __init__(self, replicas: Replicas, settings: ServerSettings) -> None:
        self.replicas, self.settings = replicas, settings
        self.bodies = Bodies(settings.max_bodies_bytes)
        self.registry = CollectorRegistry()
        self.registry.register(ReplicaCollector(replicas))
        self._reading = 0
        self._stopping = False

    @property
    def trouble(self) -> str:
        """Why it takes no requests; empty while it does."""
        if self._stopping:
            return STOPPING
        return "" if self.replicas.able() else f"no replica works: {_troubles(self.replicas)}"

    def announce_stop(self) -> None:
        """Refuse new requests from now on; the replicas finish those that are open."""
        self._stopping = True

    def abort(self) -> None:
        """Nothing: the replicas end what is open when they are told to."""

    def close(self) -> None:
        """Nothing is kept."""

    @contextmanager
    def room(self) -> Iterator[Room]:
        """Room for a request's body while it is read.

        Raises:
            ApiError: 429 if as many requests are open as may.
        """
        limit = self.settings.max_open_requests
        if self._reading + sum(replica.open for replica in self.replicas.all) >= limit:
            raise too_many(f"{limit} requests are open, which is the limit. Try again later.")
        room = Room(self.bodies)
        self._reading += 1
        try:
            yield room
        finally:
            self._reading -= 1
            room.leave()


def make_front(replicas: Replicas, settings: ServerSettings) -> FastAPI:
    """The application in front of replicas; its key, bodies and errors are as theirs."""
    service = FrontService(replicas, settings)
    app = FastAPI(title="Helix", openapi_url=None, redirect_slashes=False)
    app.state.service = service
    install_error_handlers(app)

    @app.get("/health")
    async def health() -> Health:
        """Degraded while some replica does not work."""
        if service.trouble:
            raise unavailable(service.trouble)
        reason = _troubles(replicas) or None
        return Health(status="degraded" if reason else "ok", reason=reason)

    @app.get("/metrics", response_class=Response)
    async def metrics(request: Request) -> Response:
        """Of the replicas as this process sees them; their own are at /replicas/NUMBER/metrics."""
        if settings.protect_metrics:
            check_key(settings.api_keys, request)
        return Response(generate_latest(service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/replicas/{number}/metrics", response_class=Response)
    async def metrics_of_one(number: str, request: Request) -> Response:
        """What one replica says of itself."""
        chosen = [replica for replica in replicas.all if str(replica.number) == number]
        request.scope["raw_path"] = b"/metrics"
        return Relayed(chosen, request, b"")

    @app.api_route("/{path:path}", methods=METHODS, response_class=Response)
    async def anything_else(path: str, request: Request) -> Any:
        """What the replicas answer."""
        if service.trouble:
            raise unavailable(service.trouble)
        with service.room() as room:
            body = b""
            if request.method == "POST":
                check_key(settings.api_keys, request)
                body = await read_body(request, settings, room)
            return Relayed(replicas.for_request(beginning_of(body)), request, body)

    return app


class ReplicaCollector(Collector):
    """The state of each replica, read when Prometheus asks."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily(
            "helix_replica_up", "1 while a replica takes requests.", labels=["replica"]
        )
        busy = GaugeMetricFamily(
            "helix_replica_open_requests", "Requests that it answers now.", labels=["replica"]
        )
        answered = CounterMetricFamily(
            "helix_replica_answered_requests", "Responses that came whole.", labels=["replica"]
        )
        lost = CounterMetricFamily(
            "helix_replica_lost_requests",
            "Responses that ended because it was gone.",
            labels=["replica"],
        )
        restarts = CounterMetricFamily(
            "helix_replica_restarts",
            "How often it was started again after it had ended.",
            labels=["replica"],
        )
        for replica in self._replicas.all:
            labels = [str(replica.number)]
            up.add_metric(labels, float(not replica.trouble))
            busy.add_metric(labels, replica.open)
            answered.add_metric(labels, replica.answered)
            lost.add_metric(labels, replica.lost)
            restarts.add_metric(labels, replica.restarts)
        yield from (up, busy, answered, lost, restarts)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask."""
        return iter(())


def _troubles(replicas: Replicas) -> str:
    """What is wrong with which replica; empty if nothing is."""

    def text(replica: Replica) -> str:
        return f"replica {replica.number}: {replica.trouble}"

    return " ".join(text(replica) for replica in replicas.all if replica.trouble)
