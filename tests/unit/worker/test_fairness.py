"""Weighted shares of a busy worker: by tokens served, over prompts and answers, whoever came first with how much."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

MakeWorld = Callable[..., Any]


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def serve(fleet: Any, steps: int) -> None:
    for _ in range(steps):
        assert fleet.step()


def shares(fleet: Any, ids: dict[str, list[int]], *, prompt_tokens: int) -> Counter[str]:
    """Service by tenant: computed prompt tokens, and generated ones twice."""
    served: Counter[str] = Counter()
    for tenant, numbers in ids.items():
        begun = [fleet.results[number] for number in numbers if fleet.results[number].token_ids]
        served[tenant] = sum(prompt_tokens + 2 * len(result.token_ids) for result in begun)
    return served


@pytest.mark.parametrize(("heavy", "light"), [(4, 1), (1, 1), (3, 2)])
def test_two_backlogged_tenants_get_their_weights(world: MakeWorld, heavy: int, light: int) -> None:
    fleet = world(num_blocks=256, max_sequences=4)
    ids = {
        tenant: [fleet.submit(prompt(20, seed=1000 * weight + i), tenant=tenant, weight=weight) for i in range(400)]
        for tenant, weight in (("a", heavy), ("b", light))
    }
    serve(fleet, 700)
    assert fleet.scheduler.num_waiting > 200
    served = shares(fleet, ids, prompt_tokens=20)
    assert served["a"] / served["b"] == pytest.approx(heavy / light, rel=0.05)


def test_a_flood_does_not_push_back_a_quiet_tenant(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_sequences=4)
    for i in range(300):
        fleet.submit(prompt(20, seed=i), tenant="flood")
    serve(fleet, 50)
    late = fleet.submit(prompt(20, seed=999), tenant="quiet")
    serve(fleet, 12)  # one sequence of the flood has to end first, and its own prompt and first token
    assert fleet.results[late].token_ids


def test_idle_time_gives_no_credit(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_sequences=2)
    for i in range(100):
        fleet.submit(prompt(20, seed=i), tenant="a")
    serve(fleet, 300)  # a alone
    ids = {
        "a": [fleet.submit(prompt(20, seed=2000 + i), tenant="a") for i in range(100)],
        "b": [fleet.submit(prompt(20, seed=3000 + i), tenant="b") for i in range(100)],
    }
    before = len(fleet.batches)
    while not any(fleet.results[number].token_ids for number in ids["a"]):
        assert fleet.step()
    assert len(fleet.batches) - before < 400
    first_of_a = sum(bool(fleet.results[number].token_ids) for number in ids["b"])
    assert first_of_a < 70, "b was served alone as if it had waited for all that a had"


def test_priority_orders_inside_a_tenant_only(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_sequences=1)
    others = [fleet.submit(prompt(8, seed=i), tenant="a") for i in range(4)]
    urgent = [fleet.submit(prompt(8, seed=50 + i), tenant="b", priority=9) for i in range(4)]
    low, high = (fleet.submit(prompt(8, seed=70 + p), tenant="c", priority=p) for p in (0, 1))
    fleet.run()
    started = [share.sequence_id for batch in fleet.batches for share in batch.sequences if share.start == 0]
    assert started.index(high) < started.index(low)
    assert started.index(others[1]) < started.index(urgent[3])


def test_a_cached_prompt_is_not_charged(world: MakeWorld) -> None:
    """Computed tokens are service, cached ones are not: who reuses gets more answers for its share."""
    fleet = world(num_blocks=256, max_sequences=2)
    shared = prompt(40, seed=5)
    fleet.tokens(shared, tenant="a", max_tokens=1)
    reuse = [fleet.submit([*shared, 3 + i], tenant="a", max_tokens=1) for i in range(60)]
    unique = [fleet.submit(prompt(41, seed=100 + i), tenant="b", max_tokens=1) for i in range(60)]
    while sum(bool(fleet.results[number].token_ids) for number in unique) < 6:
        assert fleet.step()
    assert sum(bool(fleet.results[number].token_ids) for number in reuse) > 40


def test_who_comes_one_by_one_gets_no_more_than_its_share(world: MakeWorld) -> None:
    """Between two requests of its own it has none: what it had is remembered all the same."""
    fleet = world(num_blocks=256, max_sequences=1)
    small = [fleet.submit(prompt(8, seed=i), tenant="b", max_tokens=1) for i in range(400)]
    large: list[int] = []
    for _ in range(200):
        if not large or fleet.results[large[-1]].finish:
            large.append(fleet.submit(prompt(150, seed=1000 + len(large)), tenant="a", max_tokens=1))
        assert fleet.step()
    served = shares(fleet, {"a": large}, prompt_tokens=150)["a"], shares(fleet, {"b": small}, prompt_tokens=8)["b"]
    assert served[0] == pytest.approx(served[1], rel=0.2)


def test_owners_that_are_gone_leave_nothing_behind(world: MakeWorld) -> None:
    fleet = world(num_blocks=256, max_sequences=2)
    for i in range(50):
        fleet.submit(prompt(20, seed=i), tenant=f"t{i}", max_tokens=1)
    fleet.run()
    assert not fleet.scheduler._queue._owners
