"""What a server tells Prometheus: requests by route and status, times, and the engine's own figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from leveret.generate.live import Event

TYPE = CONTENT_TYPE_LATEST
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LONG = (*SHORT, 120, 300)


class Metrics:
    """Counters of one server; no label comes from a request's text."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self.registry = CollectorRegistry()
        more: Any = {"registry": self.registry}
        self.requests = Counter("leveret_http_requests", "Requests answered.", ("route", "status"), **more)
        self.seconds = Histogram(
            "leveret_http_request_seconds", "From a request's headers to the end of its reply.", ("route",),
            buckets=LONG, **more,
        )  # fmt: skip
        self.first = Histogram(
            "leveret_first_piece_seconds", "From a prepared request to the first piece of its answer.",
            buckets=SHORT, **more,
        )  # fmt: skip
        self.prepared = Histogram(
            "leveret_prepare_seconds", "Reading a body, its pictures and its prompt.", buckets=SHORT, **more
        )
        self.answers = Counter("leveret_answers", "Answers ended.", ("finish",), **more)
        self.tokens = Counter("leveret_tokens", "Tokens: of prompts, of those the reused, of answers.", ("of",), **more)
        self.images = Counter("leveret_images", "Pictures in requests.", **more)
        self.refused = Counter("leveret_refused", "Requests refused.", ("code",), **more)
        self.connections = Gauge("leveret_connections", "Connections open.", **more)
        self.held = Gauge(
            "leveret_held_bytes", "Bytes of bodies that are read, and of pictures until the reply is sent.", **more
        )
        self.registry.register(_Engine(figures))

    def ended(self, event: Event) -> None:
        """Count an answer by its last event."""
        self.answers.labels(str(event.finish)).inc()
        self.tokens.labels("prompt").inc(event.prompt_tokens)
        self.tokens.labels("reused").inc(event.reused_tokens)
        self.tokens.labels("answer").inc(event.tokens)

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return bytes(generate_latest(self.registry))


class _Engine:
    """`Live.figures` as they are at the moment of asking."""

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self.figures = figures

    def collect(self) -> Iterable[Any]:
        for name, value in self.figures().items():
            plain = "".join(letter if letter.isalnum() else "_" for letter in name)
            yield GaugeMetricFamily(f"leveret_engine_{plain}", f"The engine's {name}.", value=value)
