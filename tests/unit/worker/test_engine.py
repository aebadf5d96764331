"""The engine's thread: work in, reports out, errors contained, silence when idle."""

from __future__ import annotations

import queue
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvstore.block import BrokenInvariant
from kvstore.block_pool import BlockPool
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from pando.errors import ConfigError
from worker.admission import SchedulerLimits
from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.engine import Engine, StepReport
from worker.engine_work import EngineStopped
from worker.holdings import OwnerQuota, PinRequest, PurgeCount
from worker.runner import ModelSpec
from worker.scheduler import Scheduler
from worker.sequence import Finish, SequenceOutput, SequenceRequest
from worker.simulated_runner import SimulatedRunner, StepCost
from worker.step_rates import StepRates

SPEC = ModelSpec("simulated", bytes(16), 500, 2000, (2,), 256, 4)
POISON = 499


class FailingRunner(SimulatedRunner):
    """Fails every step that has a certain token in it."""

    def execute(self, batch: Batch) -> list[int]:
        if any(POISON in share.token_ids for share in batch.sequences):
            raise RuntimeError("out of memory")
        return super().execute(batch)


class Harness:
    def __init__(self, runner: SimulatedRunner) -> None:
        self.pool = BlockPool(SPEC.num_blocks, SPEC.block_size)
        self.scheduler = Scheduler(self.pool, SchedulerLimits(64, 16, 1000, SPEC.max_model_len))
        self.reports: list[StepReport] = []
        self.ends: queue.SimpleQueue[SequenceOutput] = queue.SimpleQueue()
        self.broken = threading.Event()
        self.engine = Engine(runner, self.pool, self.scheduler, self._on_step, on_broken=self.broken.set)

    def _on_step(self, report: StepReport) -> None:
        self.reports.append(report)
        for output in report.outputs:
            if output.finish is not None:
                self.ends.put(output)

    def submit(self, sequence_id: int, prompt: list[int], max_tokens: int = 8, priority: int = 0) -> None:
        self.engine.submit(
            SequenceRequest(
                sequence_id,
                array("I", prompt),
                len(prompt),
                (Region(ScopeRoot(b"r" * 16), None),),
                SamplingParams(max_tokens=max_tokens),
                priority=priority,
            )
        )

    def ended(self, count: int) -> dict[int, SequenceOutput]:
        found = [self.ends.get(timeout=10) for _ in range(count)]
        return {output.sequence_id: output for output in found}


@pytest.fixture
def harness() -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(runner: SimulatedRunner | None = None, *, start: bool = True) -> Harness:
        made.append(Harness(runner or SimulatedRunner(SPEC, StepCost(0.0002, 0.00001))))
        if start:
            made[-1].engine.start()
        return made[-1]

    yield make
    for one in made:
        one.engine.stop()
        assert not one.engine._thread.is_alive()


def test_one_report_a_step_holds_all_sequences(harness: Callable[..., Harness]) -> None:
    it = harness(start=False)
    for i in range(5):
        it.submit(i, [i + 3, 4, 5], max_tokens=3)
    while it.engine.step():
        pass
    spoken = [report for report in it.reports if report.outputs]
    assert [len(report.outputs) for report in spoken] == [5, 5, 5]
    assert it.pool.num_referenced == 0


def test_many_requests_from_many_threads(harness: Callable[..., Harness]) -> None:
    it = harness()

    def send(thread: int) -> None:
        for i in range(25):
            it.submit(thread * 25 + i, [3 + i, thread + 3, 7])

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {output.finish for output in it.ended(100).values()} == {Finish.LENGTH}
    it.engine.stop()
    assert it.pool.num_referenced == 0
    it.pool.check()


def test_cancel_ends_within_a_step(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.submit(1, [3, 4, 5], max_tokens=950)
    while not any(report.outputs for report in it.reports):
        time.sleep(0.001)
    it.engine.cancel(1)
    it.engine.cancel(1)
    assert it.ended(1)[1].finish is Finish.CANCELLED


def test_a_failing_step_ends_its_own_sequences_only(harness: Callable[..., Harness]) -> None:
    it = harness(FailingRunner(SPEC, StepCost(0.0002, 0.0)))
    it.submit(1, [3, POISON, 5])
    assert (it.ended(1)[1].finish, it.broken.is_set()) == (Finish.ERROR, False)
    it.submit(2, [3, 4, 5])
    assert it.ended(1)[2].finish is Finish.LENGTH
    it.engine.stop()
    assert it.pool.num_referenced == 0


class OddRunner(SimulatedRunner):
    """Answers a step with something that does not fit it, when told to."""

    answer: list[int] | None = None

    def execute(self, batch: Batch) -> list[int]:
        return super().execute(batch) if self.answer is None else self.answer


@pytest.mark.parametrize("answer", [[], [5, 5], [500], [-1]])
def test_an_answer_that_does_not_fit_is_an_error(harness: Callable[..., Harness], answer: list[int]) -> None:
    runner = OddRunner(SPEC, StepCost(0.0002, 0.0))
    it = harness(runner)
    runner.answer = answer
    it.submit(1, [3, 4, 5])
    assert it.ended(1)[1].finish is Finish.ERROR


def test_a_broken_invariant_stops_the_engine_and_fails_what_is_there(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.submit(1, [3, 4, 5], max_tokens=900)
    while not any(report.outputs for report in it.reports):
        time.sleep(0.001)

    def broken(*_: Any) -> None:
        raise BrokenInvariant("seen by a test")

    it.scheduler.complete = broken  # type: ignore[method-assign]
    end = it.ended(1)[1]
    assert (end.finish, end.reason) == (Finish.ERROR, "WORKER_STOPPED")
    assert it.broken.wait(5)


def test_a_runner_that_cannot_take_a_step_is_an_error_at_start(harness: Callable[..., Harness]) -> None:
    runner = OddRunner(SPEC, StepCost(0.0, 0.0))
    runner.answer = []
    with pytest.raises(ConfigError, match="first step"):
        harness(runner)


def test_stop_fails_what_still_runs(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.submit(1, [3, 4, 5], max_tokens=900)
    while not any(report.outputs for report in it.reports):
        time.sleep(0.001)
    it.engine.stop()
    assert it.ended(1)[1].reason == "WORKER_STOPPED"
    assert it.pool.num_referenced == 0


def test_an_idle_engine_sleeps_and_says_its_last_load(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.submit(1, [3, 4, 5])
    it.ended(1)
    time.sleep(0.25)
    said = len(it.reports)
    last = next(report.load for report in reversed(it.reports) if report.load is not None)
    assert (last.running, last.waiting, last.queued_tokens) == (0, 0, 0)
    assert last.free_blocks + last.cached_blocks == SPEC.num_blocks
    time.sleep(0.3)
    assert len(it.reports) == said


def test_a_drain_rejects_new_requests_and_finishes_old_ones(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.submit(1, [3, 4, 5], max_tokens=50)
    it.engine.drain()
    it.submit(2, [3, 4, 5])
    ends = it.ended(2)
    assert (ends[1].finish, ends[2].reason) == (Finish.LENGTH, "DRAINING")


def test_the_first_load_has_a_measured_prefill_rate(harness: Callable[..., Harness]) -> None:
    it = harness(SimulatedRunner(SPEC, StepCost(0.0, 0.0001)))
    it.submit(1, [3, 4, 5])
    it.ended(1)
    rate = next(report.load for report in it.reports if report.load is not None).prefill_tokens_per_s
    assert 5_000 < rate <= 10_000


def test_warming_up_leaves_no_trace(harness: Callable[..., Harness]) -> None:
    it = harness()
    it.engine.stop()
    assert it.pool.num_free == SPEC.num_blocks
    assert not [report for report in it.reports if report.outputs or report.events]


def test_a_purge_is_answered_whatever_the_engine_does(harness: Callable[..., Harness]) -> None:
    it = harness()
    root = ScopeRoot(b"r" * 16)
    it.submit(1, list(range(3, 40)))
    it.ended(1)
    assert it.engine.purge([root]).result(timeout=5) == PurgeCount(11)
    it.submit(2, [3, 4, 5], max_tokens=900)
    while not any(output.sequence_id == 2 for report in it.reports for output in report.outputs):
        time.sleep(0.001)
    assert it.engine.purge([root]).result(timeout=5).remaining == 0
    assert it.ended(1)[2].reason == "PURGED"
    it.engine.stop()
    with pytest.raises(EngineStopped):
        it.engine.purge([root]).result(timeout=5)


def test_a_pin_ends_by_itself_on_an_idle_engine(harness: Callable[..., Harness]) -> None:
    it = harness()
    regions = (Region(ScopeRoot(b"r" * 16), None),)
    tokens = list(range(3, 40))
    it.submit(1, tokens)
    it.ended(1)
    it.engine.pin(PinRequest("x", regions, (), array("I", tokens), 0.3, OwnerQuota(Quota(pinned=9))))
    deadline = time.monotonic() + 5
    while it.pool.num_referenced != 9:
        assert time.monotonic() < deadline
    while it.pool.num_referenced:
        time.sleep(0.01)
        assert time.monotonic() < deadline


def share(num_tokens: int) -> ScheduledSequence:
    return ScheduledSequence(1, array("I", range(num_tokens)), 0, [0], SamplingParams())


def test_rates_follow_large_prefills_and_ignore_decodes() -> None:
    rates = StepRates()
    assert rates.prefill_tokens_per_s == 0
    for _ in range(20):
        rates.record(Batch((share(500),)), 0.5)
        rates.record(Batch((share(1), share(1))), 0.01)
    assert rates.prefill_tokens_per_s == pytest.approx(1000)
    for _ in range(60):
        rates.record(Batch((share(500),)), 0.25)
    assert rates.prefill_tokens_per_s == pytest.approx(2000, rel=0.05)
    assert rates.step_ms == pytest.approx(250, rel=0.05)
