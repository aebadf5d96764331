"""The engine with a step on its way: what it does meanwhile, and what has to wait for the step's end."""

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Callable, Iterator

import pytest

from kvstore.block_pool import BlockPool
from kvstore.scope import Region, ScopeRoot
from pando.settings import WorkerSettings
from worker.admission import SchedulerLimits
from worker.batch import Batch, SamplingParams
from worker.engine import Engine, StepReport
from worker.process import overlaps
from worker.runner import ModelSpec
from worker.scheduler import Scheduler
from worker.sequence import Finish, SequenceOutput, SequenceRequest
from worker.simulated_runner import SimulatedRunner, SimulatedStep, StepCost

SPEC = ModelSpec("simulated", bytes(16), 500, 2000, (2,), 256, 4)
ROOT = ScopeRoot(b"r" * 16)
POISON = 499
LONG_S = 10.0


class GatedStep:
    """A step that ends when its runner lets one end."""

    def __init__(self, step: SimulatedStep, runner: GatedRunner) -> None:
        self._step = step
        self._runner = runner

    def wait(self, timeout_s: float) -> bool:
        return self._step.wait(timeout_s) and not self._runner.gated

    def tokens(self) -> list[int]:
        if self._runner.gated:
            assert self._runner.may_end.acquire(timeout=LONG_S)
        return self._step.tokens()


class GatedRunner(SimulatedRunner):
    """Tells of each launch, and, once `gated`, lets steps end one by one. A launch or a step may be made to fail."""

    def __init__(self) -> None:
        super().__init__(SPEC, StepCost(0.0002, 0.0))
        self.gated = False
        self.may_end = threading.Semaphore(0)
        self.launches: queue.SimpleQueue[Batch] = queue.SimpleQueue()

    def launch(self, batch: Batch) -> GatedStep:  # type: ignore[override]
        self.launches.put(batch)
        if any(POISON in share.token_ids and not share.start for share in batch.sequences):
            raise RuntimeError("cannot be launched")
        return GatedStep(super().launch(batch), self)

    def next_launch(self) -> Batch:
        return self.launches.get(timeout=LONG_S)


class Fixture:
    def __init__(self, *, max_sequences: int = 16) -> None:
        self.runner = GatedRunner()
        self.pool = BlockPool(SPEC.num_blocks, SPEC.block_size)
        self.scheduler = Scheduler(self.pool, SchedulerLimits(64, max_sequences, 1000, SPEC.max_model_len))
        self.outputs: queue.SimpleQueue[SequenceOutput] = queue.SimpleQueue()
        self.broken = threading.Event()
        self.engine = Engine(
            self.runner, self.pool, self.scheduler, self._on_step, on_broken=self.broken.set, overlap=True
        )

    def gate(self) -> None:
        """From the next launch on."""
        while not self.runner.launches.empty():
            self.runner.launches.get()
        self.runner.gated = True

    def ungate(self) -> None:
        self.runner.gated = False
        self.runner.may_end.release(1000)

    def submit(self, sequence_id: int, prompt: list[int], **sampling: int) -> None:
        region = (Region(ROOT, None),)
        params = SamplingParams(**({"max_tokens": 8} | sampling))
        self.engine.submit(SequenceRequest(sequence_id, array("I", prompt), len(prompt), region, params))

    def next_output(self) -> SequenceOutput:
        return self.outputs.get(timeout=LONG_S)

    def end_of(self, sequence_id: int) -> SequenceOutput:
        while (output := self.next_output()).finish is None or output.sequence_id != sequence_id:
            pass
        return output

    def _on_step(self, report: StepReport) -> None:
        for output in report.outputs:
            self.outputs.put(output)


@pytest.fixture
def make() -> Iterator[Callable[..., Fixture]]:
    made: list[Fixture] = []

    def start(**shape: int) -> Fixture:
        made.append(Fixture(**shape))
        made[-1].engine.start()
        return made[-1]

    yield start
    for one in made:
        one.ungate()
        one.engine.stop()
        assert not one.engine._thread.is_alive()
        assert one.pool.num_referenced == 0 or one.broken.is_set()
        one.pool.check(deep=True)


def test_a_step_is_launched_and_another_told_of_while_one_runs(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, [3, 4, 5])
    assert it.runner.next_launch().sequences[0].start == 0
    # The second one is launched before the first has ended.
    assert it.runner.next_launch().sequences[0].follows == 0
    assert it.outputs.empty()
    it.runner.may_end.release()
    # The first one's token is said while the second one runs, and a third is launched behind that.
    assert it.next_output().first_index == 0
    assert it.runner.next_launch().sequences[0].start == 4
    assert it.outputs.empty()


def test_what_ends_by_length_is_not_computed_on(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, [3, 4, 5], max_tokens=2)
    it.runner.may_end.release(2)
    assert it.end_of(1).finish is Finish.LENGTH
    assert [it.runner.next_launch().num_tokens for _ in range(2)] == [3, 1]
    assert it.runner.launches.empty()


def test_the_same_tokens_as_in_lockstep(make: Callable[..., Fixture]) -> None:
    def answers(engine_of: Fixture) -> dict[int, list[int]]:
        for i in range(20):
            engine_of.submit(i, [3 + i, 7, 7 + i % 3], max_tokens=5 + i)
        found: dict[int, list[int]] = {i: [] for i in range(20)}
        open_ids = set(found)
        while open_ids:
            output = engine_of.next_output()
            found[output.sequence_id] += output.token_ids
            if output.finish is not None:
                open_ids.discard(output.sequence_id)
        return found

    lockstep = Fixture()
    lockstep.engine = Engine(lockstep.runner, lockstep.pool, lockstep.scheduler, lockstep._on_step)
    lockstep.engine.start()
    wanted = answers(lockstep)
    lockstep.engine.stop()
    assert answers(make()) == wanted
    assert answers(make(max_sequences=3)) == wanted


def test_a_cancelled_one_is_said_to_have_ended_once(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, [3, 4, 5], max_tokens=900)
    for _ in range(2):
        it.runner.next_launch()
    it.engine.cancel(1)
    it.ungate()
    assert it.end_of(1).finish is Finish.CANCELLED
    it.submit(2, [3, 4, 5], max_tokens=1)
    assert {it.end_of(2).finish, it.outputs.empty()} == {Finish.LENGTH, True}


def test_a_purge_waits_for_the_step_on_its_way(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, list(range(3, 14)), max_tokens=900)
    for _ in range(2):
        it.runner.next_launch()
    purge = it.engine.purge([ROOT])
    it.runner.may_end.release()
    assert it.next_output().first_index == 0
    assert not purge.done()
    it.ungate()
    count = purge.result(timeout=LONG_S)
    assert (count.device_blocks > 0, count.remaining) == (True, 0)
    assert it.end_of(1).reason == "PURGED"
    assert it.pool.num_sealed == 0


def test_calls_and_what_comes_behind_them_keep_their_order(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, [3, 4, 5], max_tokens=900)
    it.runner.next_launch()
    seen = it.engine.call(lambda: it.scheduler.draining)
    it.engine.drain()
    it.submit(2, [3, 4, 5])
    it.ungate()
    assert seen.result(timeout=LONG_S) is False
    assert it.end_of(2).reason == "DRAINING"


def test_a_launch_that_fails_is_its_sequences_error(make: Callable[..., Fixture]) -> None:
    it = make()
    it.submit(1, [3, 4, 5], max_tokens=900)
    it.next_output()
    it.submit(2, [POISON, 4, 5])
    ends = {it.end_of(2).finish}
    it.submit(3, [3, 4, 5], max_tokens=3)
    ends.add(it.end_of(3).finish)
    assert ends == {Finish.ERROR, Finish.LENGTH}
    assert not it.broken.is_set()


class Comer:
    """Time in which somebody comes at a certain moment."""

    def __init__(self) -> None:
        self.now = 0.0
        self.at = float("inf")
        self.come: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > self.at:
            self.at = float("inf")
            self.come()


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.85])
def test_who_comes_in_the_middle_of_a_step_is_in_the_next_one(moment: float) -> None:
    time = Comer()
    step_s = 0.01
    runner = SimulatedRunner(SPEC, StepCost(step_s, 0.0), sleep=time.sleep, clock=lambda: time.now)
    pool = BlockPool(SPEC.num_blocks, SPEC.block_size)
    scheduler = Scheduler(pool, SchedulerLimits(64, 16, 1000, SPEC.max_model_len))
    reports: list[StepReport] = []
    engine = Engine(runner, pool, scheduler, reports.append, clock=lambda: time.now, overlap=True)

    def submit(sequence_id: int) -> None:
        tokens = array("I", [sequence_id + 3, 4, 5])
        params = SamplingParams(max_tokens=12)
        engine.submit(SequenceRequest(sequence_id, tokens, len(tokens), (Region(ROOT, None),), params))

    submit(1)
    for _ in range(5):
        engine.step()
    time.at, time.come = time.now + moment * step_s, lambda: submit(2)
    running = len([report for report in reports if report.batch is not None])
    while scheduler.num_sequences or engine.step():
        engine.step()
    batches = [report.batch for report in reports if report.batch is not None]
    assert [len(batch.sequences) for batch in batches[running : running + 2]] == [1, 2]
    assert {share.follows for share in batches[running + 1].sequences} == {0, None}


@pytest.mark.parametrize(("asked", "found"), [("auto", True), ("on", True), ("off", False)])
def test_a_device_that_leaves_the_cpu_alone_is_overlapped(asked: str, found: bool) -> None:
    runner = SimulatedRunner(SPEC, StepCost(0.0, 0.0))
    assert overlaps(WorkerSettings(overlap=asked), runner) is found


def test_a_stop_waits_for_the_steps_on_their_way(make: Callable[..., Fixture]) -> None:
    it = make()
    it.gate()
    it.submit(1, [3, 4, 5], max_tokens=900)
    for _ in range(2):
        it.runner.next_launch()
    stopper = threading.Thread(target=it.engine.stop)
    stopper.start()
    it.ungate()
    stopper.join(LONG_S)
    assert it.end_of(1).reason == "WORKER_STOPPED"
    assert it.pool.num_referenced == 0
