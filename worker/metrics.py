"""Prometheus metrics of a worker, read off the step reports on their way out.

Knows nothing of how steps are made. Names follow vLLM's where they mean the same, with our prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from operator import attrgetter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily

from kvstore.block_pool import BlockPool
from kvstore.tiers import TierCounts
from worker.batch import Batch
from worker.engine import Load, OnStep, StepReport
from worker.runner import BlockMover
from worker.sequence import AdmissionFacts, SequenceOutput

_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_QUEUE_SECONDS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_POOL_COUNTS: tuple[tuple[str, str, Callable[[BlockPool], int]], ...] = (
    (
        "blocks_evicted",
        "KV blocks whose content was given up, for room or by a purge",
        attrgetter("evictions"),
    ),
    ("key_collisions", "Looks that met another content under their key", attrgetter("contents.collisions")),
)


class StepMetrics:
    """An `on_step` that counts and passes on. `registry` holds the metrics."""

    def __init__(self, then: OnStep, *, model: str, worker: str) -> None:
        self.registry = CollectorRegistry()
        self._then = then
        self._pools: dict[str, BlockPool] = {}
        self._labels = {"model_name": model, "worker": worker}
        self._num_preemptions = self._num_discarded = 0
        self._running = self._gauge("num_requests_running", "Sequences that run")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait")
        self._usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks that sequences hold, 0 to 1")
        self._cached = self._gauge("kv_cached_blocks", "KV blocks that are kept for reuse and held by no sequence")
        self._rate = self._gauge("prefill_tokens_per_second", "Moving average of the prefill rate")
        self._prompt = self._counter("prompt_tokens", "Prefill tokens computed")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._discarded = self._counter("discarded_tokens", "Tokens computed for sequences that had ended meanwhile")
        self._hits = Counter(
            "pando_prefix_cache_hits",
            "Prompt tokens found in the prefix cache at admission, by tier and by whose they are: own, published",
            [*self._labels, "tier", "scope"],
            registry=self.registry,
        )
        self._copied = self._counter("kv_blocks_copied", "KV blocks of which a sequence took the start by copy")
        self._moved = Counter(
            "pando_kv_blocks_moved",
            "KV blocks and the CPU tier, by what became of them",
            [*self._labels, "outcome"],
            registry=self.registry,
        )
        self._moved_before = TierCounts()
        self._preempted = self._counter("num_preemptions", "Preemptions")
        self._finished = Counter(
            "pando_request_success",
            "Sequences ended, by reason",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )
        self._step_tokens = self._histogram("iteration_tokens", "Tokens computed in a step", _STEP_TOKENS)
        self._step_seconds = self._histogram("step_seconds", "Duration of a step", _STEP_SECONDS)
        self.registry.register(self)
        self._queue_seconds = self._histogram("request_queue_time_seconds", "Wait before admission", _QUEUE_SECONDS)

    def watch(self, tier: str, pool: BlockPool) -> None:
        """Tell what a pool counts, whenever the metrics are read."""
        self._pools[tier] = pool

    def watch_error(self, mover: BlockMover) -> None:
        """Tell how far from what they were blocks come back from the CPU tier, whenever the metrics are read."""
        text = "Largest difference of a KV block that came back from the CPU tier, relative to its norm"
        self._gauge("kv_cpu_error_ratio", text).set_function(lambda: mover.largest_error)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What the watched pools counted since the start."""
        for name, text, read in _POOL_COUNTS:
            family = CounterMetricFamily(f"pando_kv_{name}", text, labels=[*self._labels, "tier"])
            for tier, pool in self._pools.items():
                family.add_metric([*self._labels.values(), tier], read(pool))
            yield family

    def __call__(self, report: StepReport) -> None:
        """Count a report and pass it on."""
        self._then(report)
        if report.batch is not None:
            self._step_tokens.observe(report.batch.num_tokens)
            self._step_seconds.observe(report.seconds)
            self._prompt.inc(_prefill_tokens(report.batch))
        self._preempted.inc(report.num_preemptions - self._num_preemptions)
        self._num_preemptions = report.num_preemptions
        self._discarded.inc(report.num_discarded_tokens - self._num_discarded)
        self._num_discarded = report.num_discarded_tokens
        self._count_outputs(report.outputs)
        if report.moved is not None and report.moved != self._moved_before:
            self._count_moved(report.moved)
        if report.load is not None:
            self._show(report.load)

    def _count_outputs(self, outputs: list[SequenceOutput]) -> None:
        self._generated.inc(sum(len(output.token_ids) for output in outputs))
        for output in outputs:
            if output.admission is not None:
                self._count_admission(output.admission)
            if output.finish is not None:
                self._finished.labels(*self._labels.values(), output.finish.value).inc()

    def _count_admission(self, facts: AdmissionFacts) -> None:
        on_cpu, remote = facts.cached_cpu_published_tokens, facts.cached_remote_published_tokens
        on_device = facts.cached_published_tokens - on_cpu - remote
        for tier, cached, published in (
            ("device", facts.cached_device_tokens, on_device),
            ("cpu", facts.cached_cpu_tokens, on_cpu),
            ("remote", facts.cached_remote_tokens, remote),
        ):
            for scope, tokens in (("own", cached - published), ("published", published)):
                self._hits.labels(*self._labels.values(), tier, scope).inc(tokens)
        self._copied.inc(facts.blocks_copied)
        self._queue_seconds.observe(facts.queue_s)

    def _count_moved(self, moved: TierCounts) -> None:
        for outcome, count in asdict(moved).items():
            change = count - getattr(self._moved_before, outcome)
            if change:
                self._moved.labels(*self._labels.values(), outcome).inc(change)
        self._moved_before = replace(moved)

    def _show(self, load: Load) -> None:
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        held = load.device_blocks - load.free_blocks - load.cached_blocks
        self._usage.set(held / load.device_blocks if load.device_blocks else 0.0)
        self._cached.set(load.cached_blocks)
        self._rate.set(load.prefill_tokens_per_s)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"pando_{name}", text, list(self._labels), registry=self.registry).labels(*self._labels.values())

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"pando_{name}", text, list(self._labels), registry=self.registry).labels(*self._labels.values())

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"pando_{name}", text, list(self._labels), buckets=buckets, registry=self.registry)
        return metric.labels(*self._labels.values())


def _prefill_tokens(batch: Batch) -> int:
    """Tokens computed beyond one a sequence and step, which is what decoding takes."""
    lengths = [len(s.token_ids) for s in batch.sequences if s.sampling is None or len(s.token_ids) > 1]
    return sum(lengths)
