"""Prometheus metrics of the gateway, in a registry of its own.

Names have the prefix `shoal_` and base units; those that other serving systems have too keep their names, so boards
can be moved. Labels never hold a key, a tenant or text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from shoal.spec.ids import BlockRange

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


Coverage = Sequence[tuple[BlockRange, int]]
"""A model's blocks in order, as ranges of equally many servers that host them."""


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
        self.queue_s = Histogram(
            "shoal_request_queue_time_seconds",
            "From the request to its admission by every server of its chain.",
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
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

        self.spotchecks = Counter(
            "shoal_spotchecks",
            "Calls that were to be computed again, by what came of it.",
            ["result"],
            registry=registry,
        )

    def spotcheck(self, result: str) -> None:
        """Count a check of a server. `result` is one of a few fixed words, such as "agreed", "caught" or "busy"."""
        self.spotchecks.labels(result).inc()

    def failover(self, cause: str) -> None:
        """Count a rebuilt chain. `cause` is one of a few fixed words, such as "closed", "silent" or "drained"."""
        self.failovers.labels(cause).inc()

    def watch(self, coverage: Callable[[], Mapping[str, Coverage]]) -> None:
        """Export who hosts what of each model, as it is whenever somebody asks. Called once."""
        self.registry.register(_Hosted(coverage))

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


class _Hosted(Collector):
    """Gauges that are computed when they are asked for: a span that no longer exists leaves no number behind."""

    def __init__(self, coverage: Callable[[], Mapping[str, Coverage]]) -> None:
        self._coverage = coverage

    def collect(self) -> Iterable[GaugeMetricFamily]:
        blocks = GaugeMetricFamily("shoal_blocks", "Blocks of the model.", labels=["model"])
        covered = GaugeMetricFamily("shoal_blocks_covered", "Blocks that a server hosts.", labels=["model"])
        replicas = GaugeMetricFamily(
            "shoal_replicas", "Servers that host a range of blocks.", labels=["model", "span"]
        )  # fmt: skip
        for model, ranges in self._coverage().items():
            blocks.add_metric([model], sum(len(span) for span, _ in ranges))
            covered.add_metric([model], sum(len(span) for span, servers in ranges if servers))
            for span, servers in ranges:
                replicas.add_metric([model, str(span)], servers)
        return blocks, covered, replicas


class RequestMeter:
    """The measurements of one generation request with one or several choices."""

    def __init__(self, metrics: Metrics) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.error: str | None = None
        self.cut = False
        """The answer is being ended early; why is known, and said to `failed`, only after its last byte."""
        self._metrics = metrics
        self._started_s = time.perf_counter()
        self._last_token_s: dict[int, float] = {}
        self._admitted = False
        metrics.waiting.inc()

    def admitted(self, prompt_tokens: int) -> None:
        """Every choice has a place; from now on the request is running."""
        self._admitted = True
        self.prompt_tokens = prompt_tokens
        self._metrics.queue_s.observe(time.perf_counter() - self._started_s)
        self._metrics.waiting.dec()
        self._metrics.running.inc()
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def prompt(self, tokens: int) -> None:
        """So many more tokens of the request are computed, where not all begin at once."""
        self.prompt_tokens += tokens
        self._metrics.prompt_tokens.inc(tokens)

    @property
    def was_admitted(self) -> bool:
        return self._admitted

    def token(self, choice: int) -> None:
        """A token of `choice` is there."""
        now_s = time.perf_counter()
        self.generated_tokens += 1
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
        self.error = code
        self._metrics.errors.labels(code).inc()

    def close(self) -> None:
        (self._metrics.running if self._admitted else self._metrics.waiting).dec()
        if self._last_token_s:
            self._metrics.request_s.observe(time.perf_counter() - self._started_s)
