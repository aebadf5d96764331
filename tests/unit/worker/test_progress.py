"""Somebody always gets on: whatever is held by those who wait, and whatever floors keep for those who are not here."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

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


def test_blocks_cover_what_is_found_when_a_part_is_dropped(world: MakeWorld) -> None:
    """Twelve blocks are more than floors leave; the copy of a part takes one away, and without it eleven are found."""
    fleet = world(num_blocks=14, num_cpu_blocks=12, max_batch_tokens=3)
    quota = OwnerQuota(Quota(ceiling=12))
    fleet.tokens(prompt(48), quota=quota, max_tokens=1)
    fleet.holdings.admit(ABSENT, (), OwnerQuota(Quota(floor=3)))
    again = fleet.submit(prompt(48) + prompt(7, seed=1), quota=quota, max_tokens=1)
    fleet.run(500)
    assert fleet.results[again].finish is Finish.LENGTH
    assert max(len(share.block_ids) for batch in fleet.batches for share in batch.sequences) == 14
    fleet.assert_nothing_held()
