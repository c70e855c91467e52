"""Prometheus metrics of the gateway, in a registry of its own.

Names have the prefix `shoal_` and base units; those that other serving systems have too keep their names, so boards
can be moved. Labels never hold a key, a tenant or text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """All counters of one gateway. The driver of the chains gets the same object and calls `failover`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_requests = Counter(
            "shoal_http_requests", "HTTP answers by route and status.", ["method", "route", "status"], registry=registry
        )
        self.running = Gauge(
            "shoal_num_requests_running", "Requests that have been admitted and get tokens.", registry=registry
        )
        self.waiting = Gauge("shoal_num_requests_waiting", "Requests that wait for their admission.", registry=registry)
        self.success = Counter(
            "shoal_request_success", "Choices that were answered to their end.", ["finished_reason"], registry=registry
        )
        self.errors = Counter(
            "shoal_request_errors", "Generation requests that failed, by error code.", ["code"], registry=registry
        )
        self.prompt_tokens = Counter("shoal_prompt_tokens", "Tokens of admitted prompts.", registry=registry)
        self.generation_tokens = Counter("shoal_generation_tokens", "Generated tokens.", registry=registry)
        self.first_token_s = Histogram(
            "shoal_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.inter_token_s = Histogram(
            "shoal_inter_token_latency_seconds",
            "Between two tokens of a choice.",
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "shoal_e2e_request_latency_seconds",
            "From the request to its last token.",
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.failovers = Counter(
            "shoal_failovers", "Chains that were rebuilt under a running answer.", ["cause"], registry=registry
        )

    def failover(self, cause: str) -> None:
        """Count a rebuilt chain. `cause` is one of a few fixed words, such as "closed", "silent" or "drained"."""
        self.failovers.labels(cause).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    @contextmanager
    def request(self) -> Iterator[RequestMeter]:
        """Measures one generation request, from here to the end of the block."""
        meter = RequestMeter(self)
        try:
            yield meter
        finally:
            meter.close()


class RequestMeter:
    """The measurements of one generation request with one or several choices."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._last_token_s: dict[int, float] = {}
        self._admitted = False
        metrics.waiting.inc()

    def admitted(self, prompt_tokens: int) -> None:
        """Every choice has a place; from now on the request is running."""
        self._admitted = True
        self._metrics.waiting.dec()
        self._metrics.running.inc()
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def token(self, choice: int) -> None:
        """A token of `choice` is there."""
        now_s = time.perf_counter()
        self._metrics.generation_tokens.inc()
        if choice in self._last_token_s:
            self._metrics.inter_token_s.observe(now_s - self._last_token_s[choice])
        elif not self._last_token_s:
            self._metrics.first_token_s.observe(now_s - self._started_s)
        self._last_token_s[choice] = now_s

    def finished(self, reason: str) -> None:
        """A choice has ended by itself."""
        self._metrics.success.labels(reason).inc()

    def failed(self, code: str) -> None:
        """The request ended with an error."""
        self._metrics.errors.labels(code).inc()

    def close(self) -> None:
        (self._metrics.running if self._admitted else self._metrics.waiting).dec()
        if self._last_token_s:
            self._metrics.request_s.observe(time.perf_counter() - self._started_s)
