"""Who may keep what: quotas as requests bring them, publishers, pins and purges, through the scheduler and by count."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.block_pool import BlockPool
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from worker.holdings import Holdings, OwnerQuota, PinRequest
from worker.sequence import Finish

MakeWorld = Callable[..., Any]

A, B, SHARED, STRANGER = (ScopeRoot(name * 16) for name in (b"a", b"b", b"p", b"s"))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def own(root: ScopeRoot) -> tuple[Region, ...]:
    return (Region(root, None),)


def published(end: int, root: ScopeRoot) -> tuple[Region, ...]:
    return (Region(SHARED, end), Region(root, None))


def floor(blocks: int, ceiling: int | None = None, pinned: int = 0) -> OwnerQuota:
    return OwnerQuota(Quota(blocks, ceiling, pinned))


def pin(tokens: list[int], *, name: str = "x", ttl_s: float = 10.0, quota: OwnerQuota | None = None) -> PinRequest:
    return PinRequest(name, published(len(tokens), A), ((SHARED, A),), array("I", tokens), ttl_s, quota)


def test_a_quota_is_set_once_changed_and_lifted() -> None:
    pool = BlockPool(64, 4)
    holdings = Holdings(pool)
    holdings.admit(A, (), None)
    assert pool.account(A).quota is None and not holdings.has_floors
    holdings.admit(A, (), floor(10, 20, 5))
    holdings.admit(A, (), floor(10, 20, 5))
    assert pool.account(A).quota == Quota(10, 20, 5) and holdings.has_floors
    holdings.admit(A, (), None)
    assert pool.account(A).quota == Quota(0, None, 5) and not holdings.has_floors


def test_a_purge_ends_floors_too() -> None:
    holdings = Holdings(BlockPool(64, 4))
    holdings.admit(A, (), floor(10))
    holdings.admit(B, (), floor(10))
    holdings.purge([A])
    assert holdings.has_floors
    holdings.purge([B])
    assert not holdings.has_floors


def test_floors_that_do_not_fit_are_left_out() -> None:
    pool = BlockPool(64, 4)
    holdings = Holdings(pool)
    holdings.admit(A, (), floor(40))
    holdings.admit(B, (), floor(40, 50, 3))
    assert pool.account(B).quota == Quota(0, 50, 3)


def test_each_tier_has_its_own_quota(world: MakeWorld) -> None:
    fleet = world(num_blocks=32, num_cpu_blocks=64)
    quota = OwnerQuota(Quota(4), Quota(100, 120))
    fleet.holdings.admit(A, ((SHARED, A),), quota)
    assert fleet.pool.account(A).quota == Quota(4)
    assert fleet.tiers.cpu.account(SHARED).quota == Quota(0, 120)
    fleet.holdings.admit(A, (), OwnerQuota(Quota(4), Quota(8, 12)))
    assert fleet.tiers.cpu.account(A).quota == Quota(8, 12)
    for i in range(4):
        fleet.tokens(prompt(60, seed=i), regions=own(A), quota=OwnerQuota(Quota(4), Quota(8, 12)), max_tokens=1)
    assert 0 < fleet.tiers.cpu.account(A).charge <= 12


def test_published_blocks_are_charged_to_their_publisher(world: MakeWorld) -> None:
    fleet = world()
    fleet.tokens(prompt(32), regions=published(24, B), publishers=((SHARED, A),), max_tokens=1)
    assert (fleet.pool.account(A).charge, fleet.pool.account(B).charge) == (6, 2)


def test_a_pin_outlives_pressure_until_its_time(world: MakeWorld) -> None:
    fleet = world(num_blocks=24, max_model_len=90)
    head = prompt(32)
    fleet.tokens([*head, 5], regions=published(32, A), publishers=((SHARED, A),), max_tokens=1)
    assert fleet.holdings.pin(pin(head, quota=floor(0, None, 8)), fleet.now) == 32
    for i in range(5):
        fleet.tokens(prompt(60, seed=i + 1), tenant="z", max_tokens=2)
    hit = fleet.submit([*head, 6], regions=published(32, B), max_tokens=1)
    fleet.run()
    assert fleet.results[hit].outputs[0].admission.cached_published_tokens == 32
    fleet.holdings.expire(fleet.now + 10.0)
    assert fleet.holdings.num_pins == 0
    fleet.assert_nothing_held()


def test_a_pin_holds_no_more_than_its_budget_and_gives_way_to_who_cannot_run(world: MakeWorld) -> None:
    fleet = world(num_blocks=16)
    head = prompt(32)
    fleet.tokens([*head, 5], regions=published(32, A), publishers=((SHARED, A),), max_tokens=1)
    assert fleet.holdings.pin(pin(head), fleet.now) == 0
    assert fleet.holdings.pin(pin(head, quota=floor(0, None, 5)), fleet.now) == 20
    assert fleet.pool.num_referenced == 5
    assert len(fleet.tokens(prompt(60, seed=9), tenant="z", max_tokens=2)) == 2
    assert fleet.holdings.num_pins == 0


def test_unpin_and_a_pin_of_the_same_name(world: MakeWorld) -> None:
    fleet = world()
    head = prompt(32)
    fleet.tokens([*head, 5], regions=published(32, A), max_tokens=1)
    fleet.holdings.pin(pin(head[:16], quota=floor(0, None, 8)), 0.0)
    fleet.holdings.pin(pin(head, quota=floor(0, None, 8)), 0.0)
    assert (fleet.holdings.num_pins, fleet.pool.num_referenced) == (1, 8)
    fleet.holdings.unpin("unknown")
    fleet.holdings.unpin("x")
    fleet.assert_nothing_held()


def test_a_purge_forgets_by_count_what_an_owner_had(world: MakeWorld) -> None:
    fleet = world()
    head = prompt(32)
    fleet.tokens([*head, 5, 6, 7, 8], regions=published(32, B), publishers=((SHARED, A),), max_tokens=1)
    fleet.tokens(prompt(20, seed=1), regions=own(A), quota=floor(4), max_tokens=1)
    fleet.holdings.pin(pin(head, quota=floor(4, None, 8)), 0.0)
    reader = fleet.submit([*head, 9, 10, 11, 12, 13], regions=published(32, B), max_tokens=40)
    mine = fleet.submit(prompt(20, seed=2), regions=own(A), max_tokens=40)
    fleet.step()
    fleet.pool.take_events()
    fleet.scheduler.cancel_owners({A})
    fleet._take()
    count = fleet.holdings.purge([A, SHARED])
    assert (fleet.results[mine].finish, fleet.results[mine].outputs[-1].reason) == (Finish.CANCELLED, "PURGED")
    # 8 of the head, which the reader holds; one of B hangs below; 5 of the first prompt and 5 of the second.
    assert (count.device_blocks, count.cpu_blocks) == (8 + 2 + 5 + 5, 0)
    assert count.remaining == 9
    assert sum(len(event.keys) for event in fleet.pool.take_events()) == 20
    assert fleet.pool.account(A).quota is None and fleet.pool.account(A).charge == 8
    fleet.run()
    assert len(fleet.results[reader].token_ids) == 40
    fresh = fleet.submit([*head, 9], regions=published(32, B), max_tokens=1)
    fleet.run()
    assert fleet.results[fresh].outputs[0].admission.cached_device_tokens == 0
    assert fleet.pool.account(A).charge == 8  # by the publisher's account again
    fleet.assert_nothing_held()


# Floors among those who run and wait


def test_behind_one_that_does_not_fit_goes_who_stays_within_its_floor(world: MakeWorld) -> None:
    fleet = world(num_blocks=32)
    fleet.tokens([5], regions=own(B), quota=floor(8), max_tokens=1)
    busy = fleet.submit(prompt(64), regions=own(A), max_tokens=8)
    fleet.step()
    large = fleet.submit(prompt(60, seed=1), regions=own(STRANGER), max_tokens=1)
    other = fleet.submit(prompt(20, seed=2), regions=own(STRANGER), max_tokens=1)
    mine = fleet.submit(prompt(28, seed=3), regions=own(B), quota=floor(8), max_tokens=1)
    fleet.step()
    assert fleet.results[mine].finish is Finish.LENGTH
    assert not any(fleet.results[i].outputs for i in (large, other))
    fleet.run()
    assert all(fleet.results[i].finish is Finish.LENGTH for i in (busy, large, other))


def test_who_stays_within_its_floor_is_not_preempted(world: MakeWorld) -> None:
    fleet = world(num_blocks=24)
    fleet.tokens([5], regions=own(B), quota=floor(12), max_tokens=1)
    _, second = (fleet.submit(prompt(16, seed=i), regions=own(A), max_tokens=30) for i in range(2))
    mine = fleet.submit(prompt(16, seed=3), regions=own(B), quota=floor(12), max_tokens=30)
    fleet.run()
    assert fleet.scheduler.num_preemptions > 0
    ends = {share.sequence_id: n for n, batch in enumerate(fleet.batches) for share in batch.sequences}
    assert max(ends, key=ends.__getitem__) == second
    starts = [share.start for batch in fleet.batches for share in batch.sequences if share.sequence_id == mine]
    assert starts == sorted(set(starts))


def hit_ratio_of_b(fleet: Any, burst: int) -> float:
    """B asks for its 8 heads again and again, within its floor; A sends unique prompts between."""
    heads = [prompt(32, seed=i) for i in range(8)]
    found = asked = 0
    for turn in range(6):
        for i, head in enumerate(heads):
            for n in range(burst):
                fleet.submit(
                    prompt(40, seed=1000 * turn + 10 * i + n), regions=own(A), quota=floor(0, 40), max_tokens=2
                )
            mine = fleet.submit([*head, 5, turn + 6], regions=own(B), quota=floor(96), max_tokens=1)
            fleet.run()
            if turn:
                found += fleet.results[mine].outputs[0].admission.cached_device_tokens
                asked += 34
    return found / asked


def test_a_burst_of_another_tenant_leaves_a_floor_as_it_is(world: MakeWorld) -> None:
    """A sends ten times its ceiling in each turn."""
    calm = hit_ratio_of_b(world(num_blocks=160), 0)
    stormy = hit_ratio_of_b(world(num_blocks=160), 5)
    assert calm > 0.9
    assert abs(calm - stormy) <= 0.02


@pytest.mark.parametrize("seed", range(6))
def test_quotas_lose_no_request(world: MakeWorld, seed: int) -> None:
    rng = random.Random(seed)
    fleet = world(num_blocks=20, max_batch_tokens=16)
    quotas = [None, floor(5), floor(3, 6), floor(0, 4), floor(8, 8)]
    asked = {}
    for _ in range(120):
        owner = rng.randrange(5)
        tokens = prompt(rng.randrange(1, 50), seed=rng.randrange(5))
        asked[
            fleet.submit(
                tokens,
                regions=own(ScopeRoot(bytes([owner]) * 16)),
                quota=quotas[owner],
                max_tokens=rng.randrange(1, 16),
            )
        ] = tokens
        for _ in range(rng.randrange(4)):
            fleet.step()
        fleet.pool.check(deep=True)
    fleet.run()
    for sequence, tokens in asked.items():
        result = fleet.results[sequence]
        assert result.finish is Finish.LENGTH
        assert result.token_ids == world(num_blocks=64, reuse=False).tokens(tokens, max_tokens=len(result.token_ids))
    fleet.assert_nothing_held()
