"""A recorded pair of blocks with equal keys: found by trying 2.8 million blocks, in a profile of 44 bits."""

from __future__ import annotations

from array import array

from kvstore.block_key import KeyChain, block_keys
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.exchange import Exchange, Export
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import Tiers, cpu_pool

KEY_BITS = 44
SIZE = 4
REGIONS = (Region(ScopeRoot(bytes(range(16))), None),)
ONE, OTHER = array("I", [9888, 62, 7, 7]), array("I", [21069, 86, 7, 7])
TAIL = array("I", [1, 2, 3, 4, 5])


def use(pool: BlockPool, tokens: array[int]) -> int:
    """Run a prompt; how many of its tokens were cached."""
    table = BlockTable(pool, REGIONS)
    cached = table.attach_prefix(tokens, len(tokens) - 1)
    assert table.reserve(len(tokens))
    table.copies_done()
    table.seal(tokens, len(tokens))
    table.release()
    return cached


def test_they_collide_in_the_profile_and_not_in_full() -> None:
    short = [block_keys(REGIONS, tokens, SIZE, key_bits=KEY_BITS) for tokens in (ONE, OTHER)]
    assert short[0] == short[1]
    assert block_keys(REGIONS, ONE, SIZE) != block_keys(REGIONS, OTHER, SIZE)
    chains = [KeyChain(REGIONS, SIZE, key_bits=KEY_BITS) for _ in range(2)]
    assert chains[0].peek(ONE.tobytes()) == chains[1].peek(OTHER.tobytes())


def test_who_comes_second_misses_and_the_first_stays() -> None:
    pool = BlockPool(16, SIZE, key_bits=KEY_BITS)
    assert use(pool, ONE + TAIL) == 0
    assert use(pool, OTHER + TAIL) == 0 == use(pool, OTHER + TAIL)
    assert use(pool, ONE + TAIL) == 2 * SIZE
    assert pool.contents.collisions > 0
    pool.check(deep=True)


def test_neither_tier_and_no_other_worker_gets_one_for_the_other() -> None:
    pool = BlockPool(16, SIZE, key_bits=KEY_BITS)
    tiers = Tiers(pool, cpu_pool(pool, 16))
    use(pool, ONE + TAIL)
    exchange, export = Exchange(tiers), Export(REGIONS, ONE + TAIL, 0, 9)
    exchange.begin_export(export)
    assert [tiers.demoted(order.id, 0) for order in tiers.take_orders().demotions] == [True, True]
    exchange.end_export(export)
    pool.clear()
    assert pool.num_sealed == 0 and tiers.cpu.num_sealed == 2
    for tokens, length in ((OTHER + TAIL, 0), (ONE + TAIL, 2)):
        table, wanted = BlockTable(pool, REGIONS), Export(REGIONS, tokens, 0, 9)
        load = tiers.attach_prefix(table, tokens, len(tokens) - 1).load
        assert (load.waiting if load is not None else 0) == length
        table.release()
        exchange.begin_export(wanted)
        assert len(wanted.rows) == length
        exchange.end_export(wanted)
