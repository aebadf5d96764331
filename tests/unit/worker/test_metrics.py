"""Metrics equal what the reports said, and reports pass through unchanged."""

from __future__ import annotations

from array import array

from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import TierCounts
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.engine import Load, StepReport
from worker.metrics import StepMetrics
from worker.sequence import AdmissionFacts, Finish, SequenceOutput


def share(num_tokens: int, last: bool = True) -> ScheduledSequence:
    return ScheduledSequence(1, array("I", range(num_tokens)), 0, [0], SamplingParams() if last else None)


def test_reports_are_counted_and_passed_on() -> None:
    passed: list[StepReport] = []
    metrics = StepMetrics(passed.append, model="m", worker="w")
    first = StepReport(
        outputs=[
            SequenceOutput(1, 0, (5,), admission=AdmissionFacts(32, 16, 0.5, 1, 48, 12)),
            SequenceOutput(2, 3, (6,), finish=Finish.STOP),
            SequenceOutput(3, 0, finish=Finish.REJECTED),
        ],
        events=[],
        load=Load(running=2, waiting=7, free_blocks=10, cached_blocks=20, device_blocks=40, prefill_tokens_per_s=99.0),
        batch=Batch((share(10), share(1), share(1, last=False))),
        seconds=0.02,
        num_preemptions=3,
        moved=TierCounts(demoted=5),
        num_discarded_tokens=2,
    )
    second = StepReport([SequenceOutput(1, 1, (5,))], [], None, Batch((share(1),)), 0.01, 4, TierCounts(7, 3), 5)
    metrics(first)
    metrics(second)
    assert passed == [first, second]

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"pando_{name}", {"model_name": "m", "worker": "w"} | labels)

    assert value("prompt_tokens_total") == 11
    assert value("generation_tokens_total") == 3
    hits = {
        (tier, scope): value("prefix_cache_hits_total", tier=tier, scope=scope)
        for tier in ("device", "cpu")
        for scope in ("own", "published")
    }
    assert hits == {("device", "own"): 28, ("device", "published"): 4, ("cpu", "own"): 36, ("cpu", "published"): 12}
    assert value("kv_blocks_copied_total") == 1
    assert [value("kv_blocks_moved_total", outcome=what) for what in ("demoted", "promoted")] == [7, 3]
    assert value("num_preemptions_total") == 4
    assert value("discarded_tokens_total") == 5
    assert value("request_success_total", finished_reason="stop") == 1
    assert value("request_success_total", finished_reason="rejected") == 1
    assert value("iteration_tokens_sum") == 13
    assert value("step_seconds_count") == 2
    assert value("request_queue_time_seconds_sum") == 0.5
    assert (value("num_requests_running"), value("num_requests_waiting")) == (2, 7)
    assert (value("kv_cache_usage_perc"), value("kv_cached_blocks")) == (0.25, 20)
    assert value("prefill_tokens_per_second") == 99


def test_what_pools_count_is_read_with_the_rest() -> None:
    metrics = StepMetrics(lambda report: None, model="m", worker="w")
    pool = BlockPool(4, 2, key_bits=1)
    metrics.watch("device", pool)
    regions = (Region(ScopeRoot(bytes(16)), None),)
    for number in range(8):
        table = BlockTable(pool, regions)
        tokens = array("I", [number] * 9)
        table.attach_prefix(tokens, 8)
        assert table.reserve(8)
        table.seal(tokens, 8)
        table.release()
    pool.clear()
    counts = [
        metrics.registry.get_sample_value(
            f"pando_kv_{name}_total", {"model_name": "m", "worker": "w", "tier": "device"}
        )
        for name in ("blocks_evicted", "key_collisions")
    ]
    assert counts == [pool.evictions, pool.contents.collisions] and min(counts) > 0
