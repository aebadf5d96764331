"""What the router counts: totals, one row a tenant, and the same for Prometheus.

Knows no request. Invariant: the number of label values is bounded; tenants past the bound are counted as "other".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from kvstore.scope import TenantId

OTHER = TenantId("other")

_TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Spent:
    """What one call took, as its usage says it. The cached tokens are split twice: by tier, and by whose they are."""

    prompt_tokens: int
    completion_tokens: int
    cached_device: int = 0
    cached_cpu: int = 0
    cached_remote: int = 0
    cached_published: int = 0
    predicted_cached: int = 0
    blocks_copied: int = 0

    @property
    def cached_tokens(self) -> int:
        """On all tiers."""
        return self.cached_device + self.cached_cpu + self.cached_remote


@dataclass(slots=True)
class Tally:
    """Sums since the start."""

    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Metrics:
    """Counts of one router. For one event loop."""

    def __init__(self, known: Iterable[TenantId] = (), *, most_tenants: int = 256) -> None:
        """`most_tenants` have rows of their own: the first `known` ones from the start, then whoever comes first."""
        self.total = Tally()
        self.tenants: dict[TenantId, Tally] = {}
        self._most_tenants = most_tenants
        self._reserved = frozenset(islice(known, most_tenants))
        self._unreserved = 0
        self.registry = CollectorRegistry()
        self._calls = Counter("pando_router_calls", "gRPC calls", ["method", "code"], registry=self.registry)
        self._requests = Counter("pando_router_requests", "Requests begun", ["tenant"], registry=self.registry)
        self._failed = self._ended("failed", "Of these, failed by Pando or out of time")
        self._refused = self._ended("refused", "Of these, refused: the caller's mistake, or a limit")
        self._cancelled = self._ended("cancelled", "Of these, taken back by the caller")
        self._tokens = Counter(
            "pando_router_tokens",
            "Tokens of finished requests: computed and cached of the prompt, completion",
            ["tenant", "kind"],
            registry=self.registry,
        )
        self._by_tier = self._counter("cached_tokens", "Prompt tokens found in cache, by tier", "tier")
        self._by_scope = self._counter("scope_cached_tokens", "The same, by whose they are: own, published", "scope")
        self._predicted = self._counter("predicted_cached_tokens", "Prompt tokens predicted to be cached")
        self._copied = self._counter("blocks_copied", "KV blocks copied before they were written")
        self._ttft = Histogram(
            "pando_router_ttft_seconds",
            "Arrival to first token",
            buckets=_TTFT_BUCKETS,
            registry=self.registry,
        )

        ProcessCollector(registry=self.registry)
        self.gauge("tasks", "Tasks of the event loop", lambda: len(asyncio.all_tasks()))

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when the metrics are."""
        Gauge(f"pando_router_{name}", text, registry=self.registry).set_function(read)

    def call(self, method: str, code: str) -> None:
        """A gRPC call ended."""
        self._calls.labels(method.rsplit("/", 1)[-1], code).inc()

    def begin(self, tenant: TenantId) -> None:
        """A request of the tenant begins."""
        self.total.requests += 1
        self._tally(tenant).requests += 1
        self._requests.labels(self._label(tenant)).inc()

    def fail(self, tenant: TenantId) -> None:
        """It failed, and not by its caller's doing."""
        self.total.failed += 1
        self._tally(tenant).failed += 1
        self._failed.labels(self._label(tenant)).inc()

    def refuse(self, tenant: TenantId) -> None:
        """It was refused: its caller's mistake, or more than a limit."""
        self._refused.labels(self._label(tenant)).inc()

    def cancel(self, tenant: TenantId) -> None:
        """Its caller went away or took it back."""
        self._cancelled.labels(self._label(tenant)).inc()

    def first_token(self, seconds: float) -> None:
        """It gave its first token."""
        self._ttft.observe(seconds)

    def used(self, tenant: TenantId, spent: Spent) -> None:
        """What it used, once it is over."""
        cached, prompt = spent.cached_tokens, spent.prompt_tokens
        for tally in (self.total, self._tally(tenant)):
            tally.prompt_tokens += prompt
            tally.cached_tokens += cached
            tally.completion_tokens += spent.completion_tokens
        label = self._label(tenant)
        kinds = {"computed": max(0, prompt - cached), "cached": cached, "completion": spent.completion_tokens}
        tiers = {"device": spent.cached_device, "cpu": spent.cached_cpu, "remote": spent.cached_remote}
        scopes = {"own": cached - spent.cached_published, "published": spent.cached_published}
        for counter, parts in ((self._tokens, kinds), (self._by_tier, tiers), (self._by_scope, scopes)):
            for part, tokens in parts.items():
                counter.labels(label, part).inc(max(0, tokens))
        self._predicted.labels(label).inc(spent.predicted_cached)
        self._copied.labels(label).inc(spent.blocks_copied)

    def exposition(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its content type."""
        return bytes(generate_latest(self.registry)), CONTENT_TYPE_LATEST  # type: ignore[no-untyped-call]

    def _ended(self, how: str, text: str) -> Counter:
        return Counter(f"pando_router_requests_{how}", text, ["tenant"], registry=self.registry)

    def _tally(self, tenant: TenantId) -> Tally:
        return self.tenants.setdefault(self._label(tenant), Tally())

    def _label(self, tenant: TenantId) -> TenantId:
        if tenant in self.tenants or tenant in self._reserved:
            return tenant
        if self._unreserved >= self._most_tenants - len(self._reserved):
            return OTHER
        self._unreserved += 1
        self.tenants[tenant] = Tally()
        return tenant

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"pando_router_{name}", text, ["tenant", *labels], registry=self.registry)
