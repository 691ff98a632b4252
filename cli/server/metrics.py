"""Counts for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from layerskip_core.decoding import DecodeStats
from layerskip_core.serving import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("layerskip_requests", "Requests by how they ended", ("endpoint", "outcome"), registry=registry)
        self._tokens = Counter(
            "layerskip_tokens",
            "Tokens: of prompts, generated, drafted, and drafts that were accepted",
            ("kind",),
            registry=registry,
        )
        self._first = Histogram(
            "layerskip_time_to_first_token_seconds", "From the request to its first token", buckets=_SECONDS, registry=registry
        )
        self._seconds = Histogram(
            "layerskip_request_seconds", "From the request to its last token", buckets=_SECONDS, registry=registry
        )
        running = Gauge("layerskip_answers_running", "Answers that are being decoded", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("layerskip_answers_waiting", "Answers that wait to be decoded", registry=registry)
        waiting.set_function(lambda: max(engine.held - engine.running, 0))

    def ended(self, endpoint: str, outcome: str) -> None:
        """A request ended; `outcome`: finished, cancelled, refused or failed."""
        self._requests.labels(endpoint, outcome).inc()

    def decoded(self, stats: DecodeStats) -> None:
        """An answer ended, or was given up after these tokens."""
        counts = {"prompt": stats.prompt_tokens, "generated": stats.new_tokens}
        for kind, count in {**counts, "drafted": stats.drafted, "accepted": stats.accepted}.items():
            self._tokens.labels(kind).inc(count)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def finished(self, seconds: float) -> None:
        self._seconds.observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text
