"""Somebody always gets on: whatever is held by those who wait, and whatever floors keep for those who are not here."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from worker.holdings import OwnerQuota, PinRequest
from worker.sequence import Finish

MakeWorld = Callable[..., Any]
ABSENT = ScopeRoot(b"f" * 16)


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(length)]


def test_a_loaded_sequence_that_waits_does_not_keep_another_from_its_end(world: MakeWorld) -> None:
    """What is not stored begins anew when it gives up its blocks: with too little room it would do so for ever."""
    fleet = world(num_blocks=14, num_cpu_blocks=64, max_batch_tokens=4, max_sequences=2)
    fleet.prefill_tokens_per_s = 1.0
    fleet.tokens(prompt(9, seed=1), max_tokens=1)
    for seed in (2, 3):
        fleet.tokens(prompt(50, seed=seed), tenant="z", max_tokens=1)
    fleet.holdings.admit(ABSENT, (), OwnerQuota(Quota(floor=5)))
    loading = fleet.submit(prompt(9, seed=1) + prompt(24, seed=5), max_tokens=1)
    fleet.step()
    running = fleet.submit(prompt(36, seed=4), no_store=True, max_tokens=1, priority=1)
    fleet.run(500)
    assert [fleet.results[i].finish for i in (running, loading)] == [Finish.LENGTH] * 2
    assert fleet.tiers.counts.promoted == 2
    fleet.assert_nothing_held()


@pytest.mark.parametrize("num_cpu_blocks", [0, 12])
def test_who_is_alone_finds_all_that_is_cached(world: MakeWorld, num_cpu_blocks: int) -> None:
    """Though it is more than floors leave to one who is not: else it is computed anew, or loaded anew for ever."""
    fleet = world(num_blocks=14, num_cpu_blocks=num_cpu_blocks, max_batch_tokens=16)
    fleet.tokens(prompt(48), max_tokens=1)
    fleet.holdings.admit(ABSENT, (), OwnerQuota(Quota(floor=3)))
    again = fleet.submit([*prompt(48), *prompt(5, seed=1)], max_tokens=1)
    fleet.run(500)
    assert fleet.results[again].outputs[0].admission.cached_device_tokens == 48
    fleet.assert_nothing_held()


@pytest.mark.parametrize("seed", range(8))
def test_random_work_under_floors_ends_and_is_right(world: MakeWorld, seed: int) -> None:
    """Over two tiers: what is not stored, keys that collide, priorities, forks, pins and purges."""
    rng = random.Random(seed)
    fleet = world(
        num_blocks=rng.choice((14, 20)),
        num_cpu_blocks=rng.choice((12, 64)),
        max_batch_tokens=rng.choice((3, 8)),
        max_sequences=rng.choice((2, 4)),
        key_bits=rng.choice((6, 128)),
    )
    alone = world(num_blocks=256, max_batch_tokens=512, reuse=False)
    fleet.prefill_tokens_per_s = 1.0
    asked: dict[int, list[int]] = {}
    for _ in range(80):
        tokens = prompt(rng.choice((0, 8, 20, 36)), seed=rng.randrange(4)) + prompt(rng.randrange(1, 14), seed=9)
        quota = OwnerQuota(Quota(rng.randrange(5), rng.choice((None, 6, 12)), 8), Quota(0, rng.choice((None, 4))))
        how: dict[str, Any] = {"no_store": rng.random() < 0.3, "priority": rng.randrange(2)}
        tenant, forks = rng.choice("abcd"), (1,) if rng.random() < 0.3 else ()
        first = fleet.submit(tokens, tenant=tenant, max_tokens=6, quota=quota, fork_seeds=forks, **how)
        asked |= {first + at: tokens for at in range(1 + len(forks))}
        owner = ScopeRoot(tenant.encode().ljust(16, b"-"))
        if rng.random() < 0.1:
            fleet.holdings.pin(PinRequest("x", (Region(owner, None),), (), array("I", tokens), 0.05, quota), fleet.now)
        elif rng.random() < 0.1:
            fleet.scheduler.cancel_owners({owner})
            fleet.holdings.purge([owner])
        for _ in range(rng.randrange(4)):
            fleet.holdings.expire(fleet.now)
            fleet.step()
        fleet.tiers.check(deep=True)
    fleet.run(5000)
    fleet.holdings.expire(fleet.now + 1.0)
    fleet.assert_nothing_held()
    for sequence, tokens in asked.items():
        answer = fleet.results[sequence].token_ids
        assert answer == alone.tokens(tokens, max_tokens=6)[: len(answer)]
        assert fleet.results[sequence].finish in (Finish.LENGTH, Finish.CANCELLED)
