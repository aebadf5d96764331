"""Published heads that end inside a block: the block store keeps that block for others, and nothing behind the head."""

from __future__ import annotations

from array import array

import pytest

from kvstore import audit
from kvstore.block import BlockId, BrokenInvariant
from kvstore.block_key import block_keys
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.contents import Content
from kvstore.events import BlocksRemoved, BlocksStored
from kvstore.pins import Pins
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot, scope_root
from kvstore.tiers import Tiers, cpu_pool

SIZE, HEAD = 4, 10
PUBLIC, GROUP, PUBLISHER, A, B = (
    scope_root(b"s", b"m", name, block_size=SIZE) for name in ("public", "group:g", "tenant:p", "tenant:a", "tenant:b")
)


def headed(tenant: ScopeRoot, end: int = HEAD) -> tuple[Region, ...]:
    return Region(PUBLIC, end), Region(tenant, None)


def text(count: int = 16, head: int = HEAD) -> array[int]:
    """Two tenants may well go on alike behind a head."""
    return array("I", [*range(head), *range(100, 100 + count - head)])


def compute(table: BlockTable, tokens: array[int], start: int, end: int) -> list[int]:
    """As a scheduler does it: where each share ended."""
    stops = []
    while start < end:
        stop = table.share_end(tokens, start, end)
        assert table.prepare_write(start, stop)
        table.take_copies()
        table.copies_done()
        table.seal(tokens, stop)
        stops.append(stop)
        start = stop
    return stops


def leader(pool: BlockPool, regions: tuple[Region, ...], tokens: array[int]) -> tuple[BlockTable, int]:
    table = BlockTable(pool, regions)
    cached = table.attach_prefix(tokens, len(tokens) - 1)
    assert table.pending is None and table.reserve(len(tokens))
    return table, cached


def run(pool: BlockPool, regions: tuple[Region, ...], tokens: array[int]) -> tuple[int, list[int]]:
    """Tokens found, and where the shares ended that computed the rest."""
    held = pool.num_referenced
    table, cached = leader(pool, regions, tokens)
    stops = compute(table, tokens, cached, len(tokens))
    table.release()
    pool.check(deep=True)
    assert pool.num_referenced == held
    return cached, stops


def test_the_first_one_stops_at_the_end_and_the_others_find_all_of_the_head() -> None:
    pool = BlockPool(32, SIZE)
    assert run(pool, headed(A), text()) == (0, [HEAD, 16])
    assert run(pool, headed(B), text()) == (HEAD, [16])
    table = BlockTable(pool, headed(B))
    assert table.attach_prefix(array("I", [*range(HEAD), 7, 7, 7]), 12) == HEAD == table.cached_published
    (order,) = table.take_copies()
    assert order.num_tokens == 2 and order.target == table.block_ids[2]
    assert audit.num_sealed_of(pool, PUBLIC) == 3
    table.release()


def test_the_first_one_goes_on_in_a_block_of_its_own() -> None:
    pool = BlockPool(32, SIZE)
    table, _ = leader(pool, headed(A), text())
    assert table.seal(text(), 9) is False
    assert table.share_end(text(), 9, 16) == HEAD
    assert table.seal(text(), HEAD) is True
    end = BlockId(table.block_ids[2])
    assert pool.is_sealed(end) and pool.contents.roots[end] == PUBLIC
    assert array("I", pool.contents.tokens[end]).tolist() == [8, 9]
    assert table.prepare_write(HEAD, 16)
    assert table.take_copies() == [(end, table.block_ids[2], 2)]
    assert table.block_ids[2] != end and pool.references(end) == 1
    table.copies_done()
    assert pool.references(end) == 0
    assert table.seal(text(), 16) is False
    table.release()


def test_who_computes_past_the_end_leaves_none() -> None:
    pool = BlockPool(32, SIZE)
    table, _ = leader(pool, headed(A), text())
    assert table.seal(text(), 11) is False
    table.release()
    assert audit.num_sealed_of(pool, PUBLIC) == 2
    assert run(pool, headed(B), text()) == (8, [HEAD, 16])


def test_nobody_stops_at_an_end_that_came_meanwhile() -> None:
    pool = BlockPool(32, SIZE)
    first, _ = leader(pool, headed(A), text())
    compute(first, text(), 0, 9)
    second = BlockTable(pool, headed(B))
    assert second.attach_blocks(text(), 15) == 8 and second.reserve(16)
    assert second.share_end(text(), 8, 16) == HEAD
    compute(first, text(), 9, 16)
    assert compute(second, text(), 8, 16) == [16]
    assert len(pool.contents.ends) == 1
    first.release()
    second.release()


def test_forks_over_the_end_share_it_only_if_it_is_sealed() -> None:
    pool = BlockPool(32, SIZE)
    table, _ = leader(pool, headed(A), text())
    compute(table, text(), 0, 9)
    twin = table.fork(9)
    assert not table.seal(text(), HEAD) and pool.contents.ends == set()  # the twin writes to that block, too
    for one in (table, twin):
        one.release()


def test_no_end_hangs_below_what_was_purged() -> None:
    pool = BlockPool(32, SIZE)
    table, _ = leader(pool, headed(A), text())
    compute(table, text(), 0, 9)
    pool.purge(PUBLIC)
    assert not table.seal(text(), HEAD) and pool.num_sealed == 0
    table.release()
    pool.check(deep=True)


def test_a_longer_block_of_the_scope_is_end_enough() -> None:
    pool = BlockPool(32, SIZE)
    assert run(pool, headed(A, 12), array("I", range(16))) == (0, [16])
    assert run(pool, headed(B), text()) == (HEAD, [16])
    assert pool.contents.ends == set()


def test_a_head_shorter_than_a_block_and_two_ends_in_one() -> None:
    pool = BlockPool(32, SIZE)
    assert run(pool, headed(A, 3), text(8, 3)) == (0, [3, 8])
    assert run(pool, headed(B, 3), text(8, 3)) == (3, [8])
    both = (Region(PUBLIC, 5), Region(GROUP, 7), Region(A, None))
    assert run(pool, both, array("I", range(50, 60))) == (0, [5, 7, 10])
    other = (Region(PUBLIC, 5), Region(GROUP, 7), Region(B, None))
    assert run(pool, other, array("I", range(50, 60))) == (7, [10])
    assert run(pool, headed(PUBLISHER, 5), array("I", range(50, 60))) == (5, [10])


def test_no_block_to_go_on_in_means_no_end() -> None:
    pool = BlockPool(4, SIZE)
    assert run(pool, headed(A), text()) == (0, [HEAD, 16])
    assert pool.contents.ends == set()


def test_who_stores_nothing_leaves_no_end() -> None:
    pool = BlockPool(32, SIZE)
    table = BlockTable(pool, headed(A), no_store=True)
    table.attach_prefix(text(), 15)
    assert table.reserve(16) and table.share_end(text(), 0, 16) == 16
    assert not table.seal(text(), HEAD) and pool.num_sealed == 0
    table.release()


def test_the_index_hears_of_full_blocks_only() -> None:
    pool = BlockPool(32, SIZE)
    run(pool, headed(A), text())
    keys = block_keys(headed(A), text(), SIZE)
    assert pool.take_events() == [BlocksStored(keys, 0)] and pool.sealed_keys() == keys
    pool.purge(PUBLIC)
    (removed,) = pool.take_events()
    assert isinstance(removed, BlocksRemoved) and sorted(removed.keys) == sorted(keys)
    assert pool.num_free == 32 and pool.contents.ends == set()


@pytest.mark.parametrize("chunk", [1, 3, 8, 16])
def test_others_wait_for_the_end_and_not_for_what_is_behind_it(chunk: int) -> None:
    pool = BlockPool(64, SIZE)
    table, _ = leader(pool, headed(A), text())
    follower, same = BlockTable(pool, headed(B)), BlockTable(pool, headed(A))
    computed = 0
    while computed < HEAD:
        follower.attach_prefix(text(), 15)
        assert follower.pending is not None and follower.pending.num_tokens == HEAD and not follower.pending.ready
        wait = follower.pending
        follower.release()
        stop = table.share_end(text(), computed, min(computed + chunk, 16))
        compute(table, text(), computed, stop)
        computed = stop
    assert computed == HEAD and wait.ready
    assert follower.attach_prefix(text(), 15) == HEAD and follower.pending is None
    same.attach_prefix(text(), 15)
    assert same.pending is not None and same.pending.num_tokens == 16  # its own tail, too
    for one in (table, follower, same):
        one.release()
    assert len(pool.flights) == 0


def test_a_leader_that_goes_wakes_who_waits_for_the_end() -> None:
    pool = BlockPool(64, SIZE)
    table, _ = leader(pool, headed(A), text())
    compute(table, text(), 0, 9)
    follower = BlockTable(pool, headed(B))
    assert follower.attach_prefix(text(), 15) == 8 and follower.pending is not None
    wait = follower.pending
    follower.release()
    table.release()
    assert wait.ready
    assert run(pool, headed(B), text()) == (8, [HEAD, 16])


def test_the_publisher_pays_and_a_purge_takes_it() -> None:
    pool = BlockPool(32, SIZE)
    pool.set_publisher(PUBLIC, PUBLISHER)
    table, _ = leader(pool, headed(A), text())
    compute(table, text(), 0, HEAD)
    assert (pool.account(PUBLISHER).charge, pool.account(A).charge) == (3, 1)
    pool.purge(A)
    assert audit.num_sealed_of(pool, PUBLISHER) == 3
    pool.purge(PUBLISHER)
    assert pool.num_sealed == 0
    compute(table, text(), HEAD, 16)  # nobody finds the block any more, so it is written on
    table.release()
    assert pool.num_free == 32


def test_a_pin_holds_the_end() -> None:
    pool = BlockPool(12, SIZE)
    pins = Pins(pool)
    run(pool, headed(A), text())
    pins.set_quota(PUBLIC, Quota(pinned=3))
    assert pins.pin("x", headed(PUBLIC), text()[:HEAD], 9.0) == HEAD
    assert pins.num_pinned(PUBLIC) == 3 == pool.num_referenced
    run(pool, (Region(B, None),), array("I", range(500, 536)))
    assert run(pool, headed(B), text()) == (HEAD, [16])
    pins.set_quota(PUBLIC, Quota(pinned=2))
    assert len(pins) == 0
    assert pins.pin("x", headed(PUBLIC), text()[:HEAD], 9.0) == 8
    pins.unpin("x")


def test_an_end_is_dropped_and_not_demoted() -> None:
    pool = BlockPool(8, SIZE)
    tiers = Tiers(pool, cpu_pool(pool, 8))
    run(pool, headed(A), text())
    assert tiers.demote() == 4  # the full blocks
    for order in tiers.take_orders().demotions:
        assert tiers.demoted(order.id, 1)
    pool.clear()
    tiers.check(deep=True)
    assert tiers.cpu.num_sealed == 4 and tiers.cpu.contents.ends == set()


def test_nothing_is_sealed_as_an_end_that_is_shared_or_free() -> None:
    pool = BlockPool(8, SIZE)
    content = Content(block_keys(headed(A), text(), SIZE)[0], PUBLIC, 0, bytes(8))
    with pytest.raises(BrokenInvariant, match="free"):
        pool.seal_end(BlockId(0), content)
