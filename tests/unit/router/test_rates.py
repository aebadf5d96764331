"""Rates that are measured as requests pass."""

from __future__ import annotations

import numpy as np
import pytest

from router.rates import LengthRates, Mean, Meters, seconds_per_token


def test_what_was_not_measured_is_as_its_peers() -> None:
    assert seconds_per_token(np.array([0.0, 1000.0])).tolist() == [1e-3, 1e-3]
    assert seconds_per_token(np.zeros(2)).tolist() == [1 / 2000, 1 / 2000]
    assert len(seconds_per_token(np.zeros(0))) == 0


def test_a_mean_begins_with_its_first_samples_and_then_forgets() -> None:
    mean = Mean(1.0, 0.1)
    mean.add(0.0)
    mean.add(1.0)
    assert mean.value == pytest.approx(0.5)
    for _ in range(100):
        mean.add(0.25)
    assert mean.value == pytest.approx(0.25, abs=1e-3)


def test_a_length_has_a_factor_of_its_own_once_a_few_were_seen() -> None:
    lengths = LengthRates()
    for number in range(8):
        assert lengths.factor(9000) == 1.0, number
        lengths.learn(9000, 3.0, 2.0)
    assert lengths.factor(9000) == pytest.approx(1.5)
    assert lengths.factor(300) == 1.0
    for _ in range(300):
        lengths.learn(300, 1e6, 1.0)
    assert lengths.factor(300) == pytest.approx(4.0, rel=0.01)


@pytest.mark.parametrize("seconds", [60, 100_000])
def test_meters_say_how_much_there_was_a_second_of_late(seconds: int) -> None:
    meters = Meters(2, began=0.0, fade_s=30.0)
    assert meters.per_second(0.5).tolist() == [0, 0]
    step = seconds / 6000
    for number in range(6000):
        meters.add(1, step * 3, number * step)
    idle, busy = meters.per_second(float(seconds))
    assert idle == 0 and busy == pytest.approx(3, rel=0.3)
    assert meters.per_second(seconds + 300.0)[1] < 0.001


def test_meters_follow_their_workers_to_other_rows() -> None:
    meters = Meters(2, began=0.0)
    meters.add(0, 10, 5.0)
    meters.add(1, 20, 5.0)
    before = meters.per_second(6.0)
    moved = meters.moved([1, None]).per_second(6.0)
    assert moved.tolist() == pytest.approx([before[1], before[1]])
