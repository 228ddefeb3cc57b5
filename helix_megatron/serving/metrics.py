"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from helix_megatron.inference.request import Engine
from helix_megatron.serving.api_errors import CLIENT_CLOSED_REQUEST

REQUEST_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
FIRST_TOKEN_SECONDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
OUTPUT_TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 1, 3)
UNKNOWN_ROUTE = (
    "unknown"  # one label for all paths that do not exist: clients must not make up labels
)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.responses = Counter(
            "helix_http_requests",
            f"Responses by route and status; {CLIENT_CLOSED_REQUEST} is a client that went away.",
            ["route", "status"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "helix_http_requests_in_flight", "Requests that are answered now.", registry=registry
        )
        self.request_seconds = Histogram(
            "helix_http_request_duration_seconds",
            "From a request's headers to the end of its response.",
            ["route"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "helix_time_to_first_token_seconds",
            "From a request's headers to the first token of each of its sequences.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.output_token_seconds = Histogram(
            "helix_time_per_output_token_seconds",
            "Between two tokens of a sequence, on average over the sequence.",
            buckets=OUTPUT_TOKEN_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "helix_prompt_tokens",
            "Prompt tokens of accepted requests, as in their usage.",
            registry=registry,
        )
        self.generated_tokens = Counter(
            "helix_generated_tokens", "Tokens in responses, as in their usage.", registry=registry
        )
        self.failed_streams = Counter(
            "helix_failed_streams",
            "Streams that ended with an error; their HTTP status is 200.",
            registry=registry,
        )
        registry.register(EngineCollector(engine))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """`engine.stats()`, read when Prometheus asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges: dict[str, tuple[str, float]] = {
            "helix_engine_running_sequences": ("Sequences that are generated now.", stats.running),
            "helix_engine_waiting_sequences": (
                "Sequences that wait to be generated.",
                stats.waiting,
            ),
            "helix_cache_pages_used": ("Pages of the key-value cache in use.", stats.pages_used),
            "helix_cache_pages_kept": (
                "Pages that no sequence uses, kept for those that begin alike.",
                stats.pages_kept,
            ),
            "helix_cache_pages": ("Pages of the key-value cache.", stats.pages_total),
            "helix_cache_used_bytes": (
                "Keys and values in the pages in use, over all ranks.",
                stats.cache_bytes_used,
            ),
            "helix_engine_healthy": (
                "1 while the engine works, 0 after it failed.",
                int(not self._engine.failure),
            ),
        }
        counters: dict[str, tuple[str, float]] = {
            "helix_engine_prompt_tokens": (
                "Prompt tokens computed, again after a preemption.",
                stats.prompt_tokens,
            ),
            "helix_engine_generated_tokens": ("Tokens generated.", stats.generated_tokens),
            "helix_engine_steps": ("Steps of the engine.", stats.steps),
            "helix_engine_step_seconds": ("Time spent in steps.", stats.step_seconds),
            "helix_prefix_cache_query_tokens": (
                "Prompt tokens looked for among those of earlier sequences.",
                stats.prefix_asked_tokens,
            ),
            "helix_prefix_cache_hit_tokens": (
                "Prompt tokens that were found there, and not computed.",
                stats.prefix_found_tokens,
            ),
            "helix_engine_preemptions": ("Sequences that gave up their pages.", stats.preemptions),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not ask the engine."""
        return iter(())


class Observed:
    """ASGI middleware that counts requests and takes their time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED_REQUEST  # if there is no response, nobody was left to send it to

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, watched)
            except Exception:
                status = 500  # which Starlette sends on the way out
                raise
            finally:
                route = getattr(scope.get("route"), "path", UNKNOWN_ROUTE)
                self.metrics.responses.labels(route, str(status)).inc()
                seconds = time.perf_counter() - started
                self.metrics.request_seconds.labels(route).observe(seconds)
