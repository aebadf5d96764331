"""Single flight: many want the same cold prefix, one computes it."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

import pytest

from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.flights import Wait
from kvstore.scope import Region, scope_root

SIZE = 4
PUBLIC, A, B = (scope_root(b"s", b"m", name, block_size=SIZE) for name in ("public", "tenant:a", "tenant:b"))
OWN_A, OWN_B = (Region(A, None),), (Region(B, None),)


def prompt(count: int, start: int = 0) -> array[int]:
    return array("I", range(start, start + count))


@dataclass
class Job:
    """A prompt on its way through a small scheduler."""

    regions: tuple[Region, ...]
    tokens: array[int]
    table: BlockTable | None = None
    wait: Wait | None = None
    computed: int = 0
    done: bool = False


@dataclass
class Loop:
    """Admits in order, passes over those who wait, computes `chunk` tokens of each a step; counts what it computed."""

    pool: BlockPool
    chunk: int
    jobs: list[Job] = field(default_factory=list)
    num_computed: int = 0

    def step(self) -> None:
        for job in self.jobs:
            if job.table is None and not job.done and (job.wait is None or job.wait.ready):
                self.admit(job)
        for job in self.jobs:
            if job.table is not None:
                self.compute(job, job.table)

    def admit(self, job: Job) -> None:
        table = BlockTable(self.pool, job.regions)
        cached = table.attach_prefix(job.tokens, len(job.tokens) - 1)
        job.wait = table.pending
        if job.wait is not None or not table.reserve(len(job.tokens)):
            table.release()
            return
        job.table, job.computed = table, cached

    def compute(self, job: Job, table: BlockTable) -> None:
        end = min(job.computed + self.chunk, len(job.tokens))
        assert table.prepare_write(job.computed, end)
        table.take_copies()
        table.copies_done()
        self.num_computed += end - job.computed
        job.computed = end
        table.seal(job.tokens, end)
        if end == len(job.tokens):
            self.leave(job)
            job.done = True

    def leave(self, job: Job) -> None:
        assert job.table is not None
        job.table.release()
        job.table = None

    def run(self) -> None:
        for _ in range(10_000):
            if all(job.done for job in self.jobs):
                return
            self.step()
        raise AssertionError("no progress")


@pytest.mark.parametrize("chunk", [8, 64, 4096])
def test_many_cold_prompts_cost_one(chunk: int) -> None:
    loop = Loop(BlockPool(2048, SIZE), chunk, [Job(OWN_A, prompt(2048)) for _ in range(64)])
    loop.run()
    assert loop.num_computed == 2048 + 63 <= 1.05 * 2048 + 64
    assert len(loop.pool.flights) == 0 and loop.pool.num_holders == 0
    loop.pool.check(deep=True)


def test_a_shared_head_is_computed_once_for_tenants_with_private_tails() -> None:
    pool = BlockPool(4096, SIZE)
    jobs = [
        Job((Region(PUBLIC, 200), Region(scope_root(b"s", b"m", f"tenant:{n}", block_size=SIZE), None)),
            array("I", [*range(200), *range(1000 + n, 1020 + n)]))
        for n in range(40)
    ]  # fmt: skip
    loop = Loop(pool, 32, jobs)
    loop.run()
    assert loop.num_computed == 200 + 40 * 20


def test_no_wait_across_scopes() -> None:
    pool = BlockPool(64, SIZE)
    leader = BlockTable(pool, OWN_A)
    assert leader.attach_prefix(prompt(20), 19) == 0 and leader.reserve(20)
    other = BlockTable(pool, OWN_B)
    assert other.attach_prefix(prompt(20), 19) == 0 and other.pending is None
    same = BlockTable(pool, OWN_A)
    assert same.attach_prefix(prompt(20), 19) == 0 and same.pending is not None
    apart = BlockTable(pool, OWN_A)
    apart.attach_prefix(array("I", [0, 1, 2, 9, *range(16)]), 19)
    assert apart.pending is None


def test_a_wait_is_over_where_the_prompts_part() -> None:
    pool = BlockPool(64, SIZE)
    leader = BlockTable(pool, OWN_A)
    leader.attach_prefix(prompt(40), 39)
    assert leader.reserve(40)
    follower = BlockTable(pool, OWN_A)
    follower.attach_prefix(array("I", [*range(14), *range(90, 110)]), 33)
    assert follower.pending is not None and not follower.pending.ready
    leader.seal(prompt(40), 8)
    assert not follower.pending.ready
    leader.seal(prompt(40), 12)
    assert follower.pending.ready
    leader.seal(prompt(40), 16)
    assert follower.attach_prefix(array("I", [*range(14), *range(90, 110)]), 33) == 14  # three blocks and two tokens
    assert follower.pending is None


@pytest.mark.parametrize("how", ["release", "collision", "window", "purge"])
def test_a_leader_that_stops_wakes_its_followers(how: str) -> None:
    pool = BlockPool(64, SIZE)
    leader = BlockTable(pool, OWN_A)
    leader.attach_prefix(prompt(40), 39)
    assert leader.reserve(40)
    leader.seal(prompt(40), 8)
    follower = BlockTable(pool, OWN_A)
    assert follower.attach_prefix(prompt(40), 39) == 8 and follower.pending is not None
    wait = follower.pending
    follower.release()
    if how == "release":
        leader.release()
    elif how == "window":
        leader.release_before(8)
    elif how == "purge":
        assert pool.purge(A).held == 2
        leader.seal(prompt(40), 12)
    else:
        pool.reuse = False
        leader.seal(prompt(40), 12)
        pool.reuse = True
    assert wait.ready and len(pool.flights) == 0
    assert follower.attach_prefix(prompt(40), 39) == (0 if how == "purge" else 8) and follower.pending is None
    assert follower.reserve(40) and len(pool.flights) == 1
    follower.release()
    leader.release()
    assert len(pool.flights) == 0 and pool.num_referenced == 0
    pool.check(deep=True)


def test_colliding_keys_are_not_waited_for() -> None:
    pool = BlockPool(256, SIZE, key_bits=1)
    leader = BlockTable(pool, OWN_A)
    leader.attach_prefix(prompt(5), 4)
    assert leader.reserve(5)
    for start in range(1, 20):
        other = BlockTable(pool, OWN_A)
        other.attach_prefix(prompt(5, start), 4)
        assert other.pending is None and other.reserve(5)
        other.release()
    assert len(pool.flights) == 1


@pytest.mark.parametrize("seed", range(6))
def test_leaders_may_go_at_any_time(seed: int) -> None:
    """Preempted and cancelled at random, in a pool too small for all: everything that is left gets done."""
    rng = random.Random(seed)
    texts = [array("I", [*range(rng.randrange(8, 60)), *range(100 + n, 110 + n)]) for n in range(4)]
    jobs = [Job(rng.choice([OWN_A, OWN_B]), rng.choice(texts)) for _ in range(24)]
    loop = Loop(BlockPool(40, SIZE), 8, jobs)
    for _ in range(400):
        loop.step()
        running = [job for job in jobs if job.table is not None]
        if running and rng.random() < 0.4:
            job = rng.choice(running)
            loop.leave(job)
            job.done = rng.random() < 0.2
    loop.run()
    assert len(loop.pool.flights) == 0 and loop.pool.num_referenced == 0
    loop.pool.check(deep=True)


def test_nobody_waits_for_another_scope_whose_key_collides() -> None:
    """With keys of one bit half of all pairs collide; the tokens are the same, so only the scope tells them apart."""
    for start in range(0, 1600, 100):
        pool = BlockPool(16, SIZE, key_bits=1)
        tokens = prompt(2 * SIZE + 1, start)
        leader, stranger, sibling = (BlockTable(pool, regions) for regions in (OWN_A, OWN_B, OWN_A))
        leader.attach_prefix(tokens, len(tokens) - 1)
        assert leader.reserve(len(tokens))
        stranger.attach_prefix(tokens, len(tokens) - 1)
        assert stranger.pending is None
        sibling.attach_prefix(tokens, len(tokens) - 1)
        assert sibling.pending is not None
