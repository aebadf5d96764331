"""Floors, ceilings, charges, pins, purge."""

from __future__ import annotations

import random
from array import array

import pytest

from kvstore import audit
from kvstore.block import Purged
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.pins import Pins
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot, scope_root

SIZE = 4
PUBLIC, A, B, C, OPERATOR = (
    scope_root(b"s", b"m", name, block_size=SIZE)
    for name in ("public", "tenant:a", "tenant:b", "tenant:c", "tenant:operator")
)


def own(root: ScopeRoot) -> list[Region]:
    return [Region(root, None)]


def text(first: int, blocks: int) -> array[int]:
    return array("I", range(first, first + blocks * SIZE))


def run(pool: BlockPool, regions: list[Region], tokens: array[int]) -> BlockTable | None:
    table = BlockTable(pool, regions)
    table.attach_blocks(tokens, len(tokens))
    if not table.reserve(len(tokens)):
        table.release()
        return None
    table.seal(tokens, len(tokens))
    return table


def use(pool: BlockPool, regions: list[Region], tokens: array[int]) -> None:
    table = run(pool, regions, tokens)
    assert table is not None
    table.release()


def cached(pool: BlockPool, regions: list[Region], tokens: array[int]) -> int:
    table = BlockTable(pool, regions)
    found = table.attach_blocks(tokens, len(tokens))
    table.release()
    return found // SIZE


@pytest.mark.parametrize("arguments", [{"floor": -1}, {"floor": 3, "ceiling": 2}, {"pinned": -1}])
def test_bad_quotas(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="quota"):
        Quota(**arguments)


def test_floors_must_fit_the_pool() -> None:
    pool = BlockPool(10, SIZE)
    pool.set_quota(A, Quota(floor=6))
    with pytest.raises(ValueError, match="floors"):
        pool.set_quota(B, Quota(floor=5))
    pool.set_quota(A, Quota(floor=5))
    pool.set_quota(B, Quota(floor=5))
    pool.set_quota(A, None)
    pool.set_quota(C, Quota(floor=5))
    pool.check(deep=True)


def test_a_burst_does_not_touch_the_cache_within_anothers_floor() -> None:
    pool = BlockPool(40, SIZE)
    pool.set_quota(B, Quota(floor=12))
    use(pool, own(B), text(0, 12))
    for burst in range(30):
        use(pool, own(A), text(1000 * (burst + 1), 10))
    assert cached(pool, own(B), text(0, 12)) == 12
    pool.check(deep=True)


def test_over_its_floor_an_owner_gives_first() -> None:
    pool = BlockPool(40, SIZE)
    pool.set_quota(B, Quota(floor=4))
    use(pool, own(B), text(0, 12))
    for burst in range(30):
        use(pool, own(A), text(1000 * (burst + 1), 10))
    assert cached(pool, own(B), text(0, 12)) == 4
    use(pool, own(B), text(500, 3))  # over its floor again: its own oldest ones are the next to go
    use(pool, own(A), text(77_000, 10))
    assert (
        pool.account(B).charge <= 4 + 3 and cached(pool, own(B), text(500, 3)) + cached(pool, own(B), text(0, 4)) >= 4
    )
    pool.check(deep=True)


def test_spare_room_is_lent_and_taken_back_within_one_allocation() -> None:
    pool = BlockPool(20, SIZE)
    pool.set_quota(B, Quota(floor=15))
    for burst in range(5):
        use(pool, own(A), text(1000 * (burst + 1), 4))
    assert pool.account(A).charge == 20  # all of it, while B is away
    table = run(pool, own(B), text(0, 15))
    assert table is not None and pool.account(B).held == 15 and pool.account(A).charge == 5
    table.release()
    pool.check(deep=True)


def test_others_cannot_hold_into_a_floor_unless_they_are_alone() -> None:
    pool = BlockPool(20, SIZE)
    pool.set_quota(B, Quota(floor=8))
    one = run(pool, own(A), text(0, 10))
    assert one is not None
    assert run(pool, own(C), text(100, 3)) is None and pool.num_referenced == 10
    two = run(pool, own(C), text(100, 2))
    mine = run(pool, own(B), text(200, 8))
    assert two is not None and mine is not None
    for table in (one, two, mine):
        table.release()
    alone = run(pool, own(A), text(300, 20))  # it fits alone, so it runs
    assert alone is not None
    alone.release()
    pool.check(deep=True)


def test_attaching_cached_blocks_respects_floors_too() -> None:
    pool = BlockPool(20, SIZE)
    use(pool, own(A), text(0, 10))
    pool.set_quota(B, Quota(floor=8))
    holder = run(pool, own(C), text(100, 3))
    assert holder is not None
    table = BlockTable(pool, own(A))
    assert table.attach_blocks(text(0, 10), 40) == 0 and table.block_ids == []
    assert not table.reserve(40)
    assert table.attach_blocks(text(0, 10), 36) == 36
    table.release()
    mine = run(pool, own(B), text(200, 8))
    assert mine is not None
    mine.release()
    holder.release()
    pool.check(deep=True)


def test_over_the_ceiling_nothing_is_kept_and_nothing_fails() -> None:
    pool = BlockPool(40, SIZE)
    pool.set_quota(A, Quota(ceiling=6))
    use(pool, own(B), text(5000, 10))
    for burst in range(10):
        table = run(pool, own(A), text(1000 * burst, 9))
        assert table is not None and pool.account(A).held == 9
        table.release()
        assert pool.account(A).charge == 6 and pool.account(A).excess == 0
        pool.check(deep=True)
    assert cached(pool, own(B), text(5000, 10)) == 10  # all at its own cost
    assert cached(pool, own(A), text(9000, 9)) == 6
    pool.set_quota(A, Quota(ceiling=2))
    assert pool.account(A).charge == 2
    pool.set_quota(A, None)
    use(pool, own(A), text(70, 9))
    assert pool.account(A).charge == 11
    pool.check(deep=True)


def test_published_blocks_are_charged_to_their_publisher() -> None:
    pool = BlockPool(40, SIZE)
    pool.set_publisher(PUBLIC, OPERATOR)
    regions = [Region(PUBLIC, 4 * SIZE), Region(A, None)]
    table = run(pool, regions, text(0, 6))
    assert table is not None
    assert audit.charges(pool) == {OPERATOR: 4, A: 2} and pool.account(PUBLIC).held == 4
    table.release()
    use(pool, [Region(PUBLIC, 4 * SIZE), Region(B, None)], text(0, 6))
    assert audit.charges(pool) == {OPERATOR: 4, A: 2, B: 2}
    assert sum(audit.charges(pool).values()) == pool.num_blocks - pool.num_free
    pool.check(deep=True)


def test_a_publisher_over_its_ceiling_waits_for_those_below_it() -> None:
    pool = BlockPool(40, SIZE)
    use(pool, [Region(PUBLIC, 4 * SIZE), Region(A, None)], text(0, 6))
    pool.set_quota(PUBLIC, Quota(ceiling=1))
    assert pool.account(PUBLIC).charge == 4  # A's blocks hang below
    assert pool.purge(A) == Purged(2, 0)
    use(pool, own(B), text(100, 1))
    assert pool.account(PUBLIC).charge == 1
    pool.check(deep=True)


def test_purge_is_proved_by_count() -> None:
    pool = BlockPool(40, SIZE)
    regions = [Region(PUBLIC, 2 * SIZE), Region(A, None)]
    use(pool, regions, text(0, 6))
    use(pool, own(B), text(0, 6))
    running = run(pool, own(A), text(500, 3))
    assert running is not None
    assert audit.num_sealed_of(pool, A) == 7
    assert pool.purge(A) == Purged(4, 3) and audit.num_sealed_of(pool, A) == 0
    assert cached(pool, own(A), text(500, 3)) == 0 and cached(pool, own(B), text(0, 6)) == 6
    assert pool.account(A).charge == 3  # until the sequence ends
    tokens = text(500, 5)
    assert running.reserve(20)
    running.seal(tokens, 20)  # nothing could find what hangs below a purged block
    running.release()
    assert audit.charges(pool) == {PUBLIC: 2, B: 6} and audit.num_sealed_of(pool, A) == 0
    assert pool.purge(PUBLIC) == Purged(2, 0) and pool.purge(C) == Purged(0, 0)
    pool.purge(B)
    assert pool.num_free == 40
    pool.check(deep=True)


def test_accounts_that_say_nothing_are_forgotten() -> None:
    pool = BlockPool(4, SIZE)
    for number in range(100):
        use(pool, own(scope_root(b"s", b"m", f"tenant:{number}", block_size=SIZE)), text(0, 2))
    assert len(pool._ledger.owners()) <= 3


def test_pins_hold_within_the_budget_until_their_time() -> None:
    pool, regions = BlockPool(20, SIZE), own(PUBLIC)
    pins = Pins(pool)
    use(pool, regions, text(0, 6))
    assert pins.pin("head", regions, text(0, 6), until=10.0) == 0  # no budget, no pin
    pins.set_quota(PUBLIC, Quota(pinned=5))
    assert pins.pin("head", regions, text(0, 6), until=10.0) == 20
    assert pins.pin("other", regions, text(0, 6), until=5.0) == 0 and len(pins) == 1
    assert pool.num_holders == 0 and pool.num_referenced == 5
    for burst in range(10):
        use(pool, own(A), text(1000 * (burst + 1), 10))
    assert cached(pool, regions, text(0, 6)) == 5
    assert pins.expire(9.9) == 0 and pins.expire(10.0) == 1 and pool.num_referenced == 0
    for burst in range(10):
        use(pool, own(A), text(1000 * (burst + 1), 10))
    assert cached(pool, regions, text(0, 6)) == 0
    pool.check(deep=True)


def test_pins_follow_their_budget_and_give_way() -> None:
    pool, regions = BlockPool(20, SIZE), own(PUBLIC)
    pins = Pins(pool)
    pins.set_quota(PUBLIC, Quota(pinned=8))
    for name, first in (("x", 0), ("y", 100)):
        use(pool, regions, text(first, 4))
        assert pins.pin(name, regions, text(first, 4), until=first) == 16
    pins.set_quota(PUBLIC, Quota(pinned=7))
    assert pins.num_pinned(PUBLIC) == 4 and pool.num_referenced == 4
    assert run(pool, own(A), text(500, 17)) is None
    assert pins.give_way() and not pins.give_way()
    table = run(pool, own(A), text(500, 17))
    assert table is not None
    table.release()
    assert not pins.unpin("x")
    use(pool, regions, text(0, 4))
    pins.pin("x", regions, text(0, 4), until=1)
    assert pins.drop_owner(PUBLIC) == 1 and pool.num_referenced == 0


def test_a_pin_that_is_said_again_holds_on() -> None:
    """Though its owner is over its ceiling, and loses at once what nobody holds."""
    pool, regions = BlockPool(40, SIZE), own(PUBLIC)
    pins = Pins(pool)
    pins.set_quota(PUBLIC, Quota(ceiling=6, pinned=5))
    use(pool, regions, text(0, 5))
    assert pins.pin("head", regions, text(0, 5), until=10.0) == 20
    running = run(pool, regions, text(500, 8))
    assert running is not None
    assert pins.pin("head", regions, text(0, 5), until=20.0) == 20
    assert pins.num_pinned(PUBLIC) == 5 and pool.num_holders == 1
    running.release()
    assert pins.unpin("head") and pool.num_referenced == pool.num_holders == 0
    pool.check(deep=True)


@pytest.mark.parametrize("seed", range(4))
def test_floors_hold_whatever_comes(seed: int) -> None:
    """Random tenants, floors and ceilings: who is under its floor can always grow to it, and keeps its cache in it."""
    rng = random.Random(seed)
    pool = BlockPool(60, SIZE)
    roots = (A, B, C)
    quotas = {A: Quota(floor=15, ceiling=25), B: Quota(floor=20), C: Quota(ceiling=12)}
    for root, quota in quotas.items():
        pool.set_quota(root, quota)
    tables: list[BlockTable] = []
    for step in range(800):
        root = rng.choice(roots)
        before = {other: pool.account(other).charge for other in roots}
        table = run(pool, own(root), text(100 * rng.randrange(12), rng.randrange(1, 14)))
        for other, quota in quotas.items():
            lost = pool.account(other).charge < before[other]
            assert other == root or not lost or pool.account(other).charge >= quota.floor
        if table is not None:
            tables.append(table)
        while tables and (len(tables) > 5 or rng.random() < 0.3):
            tables.pop(rng.randrange(len(tables))).release()
        for other, quota in quotas.items():
            account = pool.account(other)
            if len(tables) > 1:
                assert pool.num_available >= max(0, quota.floor - account.held)
            assert quota.ceiling is None or account.charge <= max(quota.ceiling, account.held)
        if step % 20 == 0:
            pool.check(deep=True)
    for root in (A, B):
        for table in tables:
            table.release()
        tables.clear()
        holder = run(pool, own(C), text(9000, 5))
        assert holder is not None
        mine = run(pool, own(root), text(9500, quotas[root].floor))
        assert mine is not None
        tables += [holder, mine]
