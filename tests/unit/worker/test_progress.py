"""Somebody always gets on: whatever is held by those who wait, and whatever floors keep for those who are not here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from kvstore.quota import Quota
from kvstore.scope import ScopeRoot
from worker.holdings import OwnerQuota
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
