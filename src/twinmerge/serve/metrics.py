"""Counts what a server does, for Prometheus."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Of one server; a process may run several."""

    def __init__(self) -> None:
        """Start at 0."""
        self.registry = CollectorRegistry()
        self.requests = Counter("twinmerge_requests", "Answered requests", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "twinmerge_request_seconds",
            "From a request to the last byte of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("twinmerge_requests_in_flight", "Accepted and not yet answered", registry=self.registry)
        self.batch_rows = Histogram(
            "twinmerge_batch_rows", "Inputs that shared a batch", buckets=_ROWS, registry=self.registry
        )
        self.tokens = Counter("twinmerge_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        self.gate_mass = Counter(
            "twinmerge_gate_mass", "Sum of the gates of answered inputs", ["expert"], registry=self.registry
        )
        self.fallbacks = Counter(
            "twinmerge_fallbacks", "Inputs left to the shared expert, as unlike every expert's", registry=self.registry
        )

    def routed(self, gate: Mapping[str, float], fallback: bool) -> None:
        """Count under what gate an input was answered."""
        for expert, weight in gate.items():
            self.gate_mass.labels(expert).inc(abs(weight))
        self.fallbacks.inc(int(fallback))

    def page(self) -> bytes:
        """As Prometheus reads them."""
        found: bytes = generate_latest(self.registry)
        return found
