"""A full queue: whoever floods it keeps nobody out, places follow weights, and what was begun is never sent away."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from worker.sequence import Finish

MakeWorld = Callable[..., Any]


def prompt(seed: int, length: int = 8) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def refused(fleet: Any) -> list[int]:
    """Who was told that the queue is full, in order of their numbers."""
    return [
        number
        for number, result in fleet.results.items()
        if result.finish is Finish.REJECTED and result.outputs[-1].reason == "QUEUE_FULL"
    ]


def flood(fleet: Any, tenant: str, count: int, weight: int = 1) -> list[int]:
    return [fleet.submit(prompt(len(fleet.results)), tenant=tenant, weight=weight) for _ in range(count)]


def places(fleet: Any, ids: dict[str, list[int]]) -> Counter[str]:
    gone = set(refused(fleet))
    return Counter({tenant: len(set(numbers) - gone) for tenant, numbers in ids.items()})


def test_a_newcomer_takes_the_newest_place_of_who_has_most(world: MakeWorld) -> None:
    fleet = world(max_waiting=6)
    a = flood(fleet, "a", 4)
    b = flood(fleet, "b", 2)
    quiet = flood(fleet, "quiet", 1)
    assert refused(fleet) == [a[-1]]
    fleet.run()
    assert all(fleet.results[number].finish is Finish.LENGTH for number in (*a[:-1], *b, *quiet))
    fleet.assert_nothing_held()


def test_who_has_most_is_told_by_weight(world: MakeWorld) -> None:
    fleet = world(max_waiting=14)
    flood(fleet, "entitled", 10, weight=10)
    crowd = flood(fleet, "crowd", 4)
    flood(fleet, "newcomer", 1)
    assert refused(fleet) == [crowd[-1]]


@pytest.mark.parametrize(("heavy", "light"), [(1, 1), (4, 1), (1, 9)])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_floods_divide_the_queue_by_their_weights(world: MakeWorld, heavy: int, light: int, order: str) -> None:
    fleet = world(max_waiting=40)
    weights = {"a": heavy, "b": light}
    ids = {tenant: flood(fleet, tenant, 100, weights[tenant]) for tenant in order}
    held = places(fleet, ids)
    assert held.total() == 40
    assert held["a"] == pytest.approx(40 * heavy / (heavy + light), abs=1)


@pytest.mark.parametrize("room", [9, 10])
def test_floods_that_go_on_push_nobody_back_and_forth(world: MakeWorld, room: int) -> None:
    fleet = world(max_waiting=room)
    for tenant in ("a", "b"):
        flood(fleet, tenant, 20)
    settled = {n for n, result in fleet.results.items() if result.finish is None}
    for _ in range(10):
        flood(fleet, "a", 1)
        flood(fleet, "b", 1)
    assert {n for n, result in fleet.results.items() if result.finish is None} == settled


def test_whoever_has_no_place_gets_one_whatever_the_weights(world: MakeWorld) -> None:
    fleet = world(max_waiting=5)
    flood(fleet, "a", 5, weight=1000)
    for tenant in "bcdefg":
        flood(fleet, tenant, 2)
    waiting = [n for n, result in fleet.results.items() if result.finish is None]
    assert waiting == [0, 5, 7, 9, 11]  # one of each, until everybody has one


def test_what_has_spoken_or_has_begun_keeps_its_place(world: MakeWorld) -> None:
    fleet = world(max_waiting=3, max_sequences=3, num_blocks=12)
    begun = [fleet.submit(prompt(n, 12), max_tokens=20) for n in range(3)]
    while not fleet.scheduler.num_preemptions:
        assert fleet.step()
    continued = fleet.submit(prompt(9, 12), num_prompt_tokens=10, max_tokens=4)
    flood(fleet, "a", 3)
    assert fleet.scheduler.num_waiting == 3
    for tenant in "bcd":
        flood(fleet, tenant, 1)
    fleet.run()
    assert all(fleet.results[number].finish is Finish.LENGTH for number in (*begun, continued))
    fleet.assert_nothing_held()


def test_all_answers_of_a_request_go_together(world: MakeWorld) -> None:
    fleet = world(max_waiting=2)
    flood(fleet, "a", 1)
    several = fleet.submit(prompt(77), fork_seeds=(1, 2, 3))
    newcomer = flood(fleet, "b", 1)
    assert refused(fleet) == [several, several + 1, several + 2, several + 3]
    fleet.run()
    assert [fleet.results[number].finish for number in (0, *newcomer)] == [Finish.LENGTH] * 2
    fleet.assert_nothing_held()
