"""Counts for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from layerskip_core.decoding import DecodeStats
from layerskip_core.serving import Engine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """What is counted. `requests`: by endpoint and outcome, which is finished, cancelled, refused or failed."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("layerskip_requests", "Requests by how they ended", ("endpoint", "outcome"), registry=registry)
        about = "Tokens: of prompts, generated, drafted, and drafts that were accepted"
        self._tokens = Counter("layerskip_tokens", about, ("kind",), registry=registry)
        name, about = "layerskip_time_to_first_token_seconds", "From the request to its first token"
        self.first_token = Histogram(name, about, buckets=_SECONDS, registry=registry)
        name, about = "layerskip_request_seconds", "From the request to its last token"
        self.seconds = Histogram(name, about, buckets=_SECONDS, registry=registry)
        running = Gauge("layerskip_answers_running", "Answers that are being decoded", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("layerskip_answers_waiting", "Answers that wait to be decoded", registry=registry)
        waiting.set_function(lambda: max(engine.held - engine.running, 0))

    def decoded(self, stats: DecodeStats) -> None:
        """An answer ended, or was given up after these tokens."""
        counts = {"prompt": stats.prompt_tokens, "generated": stats.new_tokens}
        for kind, count in {**counts, "drafted": stats.drafted, "accepted": stats.accepted}.items():
            self._tokens.labels(kind).inc(count)
