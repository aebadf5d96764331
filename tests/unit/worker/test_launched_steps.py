"""When the next step is decided: shortly before the present one ends, by what steps took so far."""

from __future__ import annotations

from array import array

import pytest

from worker.batch import Batch, SamplingParams, ScheduledSequence
from worker.launched_steps import LATE, LaunchedSteps
from worker.runner import ModelSpec
from worker.simulated_runner import SimulatedRunner, StepCost
from worker.step_rates import StepRates

SPEC = ModelSpec("simulated", bytes(16), 500, 2000, (2,), 256, 4)


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def batch(num_tokens: int, start: int = 0) -> Batch:
    blocks = range(-(-(start + num_tokens) // SPEC.block_size))
    return Batch((ScheduledSequence(1, array("I", [5] * num_tokens), start, blocks, SamplingParams()),))


def launched(time: Time, *, overlap: bool = True) -> LaunchedSteps:
    runner = SimulatedRunner(SPEC, StepCost(0.01, 0.001), sleep=time.sleep, clock=lambda: time.now)
    return LaunchedSteps(runner, lambda: time.now, overlap=overlap)


def test_nothing_is_known_of_the_first_step(time: Time) -> None:
    steps = launched(time)
    steps.launch(batch(8))
    assert not steps.wait_until_late()
    assert time.now == 0.0
    assert steps.take_oldest().seconds == pytest.approx(0.018)


def test_the_next_one_is_decided_late_and_runs_at_once(time: Time) -> None:
    steps = launched(time)
    for start in (0, 8):
        steps.launch(batch(8 if not start else 1, start))
        steps.take_oldest()
    began = time.now
    steps.launch(batch(1, 9))
    assert steps.wait_until_late()
    assert time.now - began == pytest.approx(LATE * 0.011)
    time.sleep(0.0005)
    steps.launch(batch(1, 10))
    assert [steps.take_oldest().seconds for _ in range(2)] == pytest.approx([0.011, 0.011])
    assert time.now - began == pytest.approx(0.022)
    # What deciding took, doubled, is left for it from now on.
    began = time.now
    steps.launch(batch(1, 11))
    assert steps.wait_until_late()
    assert time.now - began == pytest.approx(LATE * 0.011 - 2 * 0.0005)


def test_nothing_is_decided_behind_a_step_that_has_ended(time: Time) -> None:
    steps = launched(time)
    for start in (0, 8):
        steps.launch(batch(8 if not start else 1, start))
        steps.take_oldest()
    steps.launch(batch(1, 9))
    time.sleep(0.02)
    assert not steps.wait_until_late()


def test_in_lockstep_a_step_runs_when_it_is_waited_for(time: Time) -> None:
    steps = launched(time, overlap=False)
    steps.rates.record(batch(1), 0.01)
    steps.launch(batch(3))
    assert not steps.wait_until_late()
    assert time.now == 0.0
    assert steps.take_oldest().seconds == pytest.approx(0.013)


def test_forecasts_go_by_steps_of_the_kind() -> None:
    rates = StepRates()
    assert rates.forecast_s(batch(1)) == 0.0
    rates.record(batch(100), 0.2)
    rates.record(batch(1), 0.01)
    assert rates.forecast_s(batch(1)) == pytest.approx(0.01)
    assert rates.forecast_s(batch(51)) == pytest.approx(0.01 + 50 * 0.002)


@pytest.fixture
def time() -> Time:
    return Time()
