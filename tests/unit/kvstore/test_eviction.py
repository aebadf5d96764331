"""The order of eviction: policies, leaves first, owners over their share first."""

from __future__ import annotations

import random
from array import array

import pytest

from kvstore.block import BlockId
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.scope import Region, scope_root

SIZE = 4
PUBLIC, A, B = (scope_root(b"s", b"m", name, block_size=SIZE) for name in ("public", "tenant:a", "tenant:b"))
OWN_A = [Region(A, None)]


def text(*words: int) -> array[int]:
    """Each word is a block of its own."""
    return array("I", [token for word in words for token in range(10 * word, 10 * word + SIZE)])


def use(pool: BlockPool, tokens: array[int], regions: list[Region] = OWN_A) -> int:
    """Run a prompt to its end; the tokens that were cached in full blocks."""
    table = BlockTable(pool, regions)
    cached = table.attach_blocks(tokens, len(tokens))
    assert table.reserve(len(tokens))
    table.seal(tokens, len(tokens))
    table.release()
    return cached


def is_cached(pool: BlockPool, tokens: array[int], regions: list[Region] = OWN_A) -> int:
    """Cached full blocks, without a hit."""
    table = BlockTable(pool, regions)
    found, _ = table._find_blocks(tokens.tobytes(), len(tokens))
    return len(found)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="one of slru, lru, fifo"):
        BlockPool(4, SIZE, policy="random")


@pytest.mark.parametrize(("policy", "survives"), [("slru", 4), ("lru", 0), ("fifo", 0)])
def test_a_scan_does_not_flush_what_was_found_twice(policy: str, survives: int) -> None:
    pool = BlockPool(20, SIZE, policy=policy)
    for _ in range(3):
        use(pool, text(1, 2, 3, 4))
    for word in range(100, 160):
        use(pool, text(word, word + 100))
    assert is_cached(pool, text(1, 2, 3, 4)) == survives
    pool.check(deep=True)


def test_one_hit_protects_nothing() -> None:
    pool = BlockPool(20, SIZE)
    for _ in range(2):
        use(pool, text(1, 2, 3, 4))
    for word in range(100, 160):
        use(pool, text(word))
    assert is_cached(pool, text(1, 2, 3, 4)) == 0


def test_the_protected_part_is_bounded_and_gives_up_the_longest_unused() -> None:
    pool = BlockPool(10, SIZE)
    for word in range(9):
        for _ in range(3):
            use(pool, text(word))
    assert pool._order._num_protected == 8
    for word in range(100, 110):
        use(pool, text(word))
    assert [is_cached(pool, text(word)) for word in range(9)] == [0] + [1] * 8
    pool.check(deep=True)


def test_lru_and_fifo_differ_in_what_a_hit_does() -> None:
    for policy, kept in (("lru", [1, 0, 1]), ("fifo", [0, 1, 1])):
        pool = BlockPool(3, SIZE, policy=policy)
        for word in (1, 2, 3, 1):
            use(pool, text(word))
        use(pool, text(9))
        assert [is_cached(pool, text(word)) for word in (1, 2, 3)] == kept
        pool.check(deep=True)


@pytest.mark.parametrize("policy", ["slru", "lru", "fifo"])
@pytest.mark.parametrize("seed", range(3))
def test_leaves_go_first_under_every_policy(policy: str, seed: int) -> None:
    """What is resident is closed under parents at any time, also across owners."""
    rng = random.Random(seed)
    pool = BlockPool(24, SIZE, policy=policy)
    regions = [OWN_A, [Region(PUBLIC, 2 * SIZE), Region(A, None)], [Region(PUBLIC, 2 * SIZE), Region(B, None)]]
    held: list[BlockTable] = []
    for _ in range(600):
        tokens = text(*(rng.randrange(2) for _ in range(rng.randrange(1, 6))))
        table = BlockTable(pool, rng.choice(regions))
        table.attach_blocks(tokens, len(tokens))
        if table.reserve(len(tokens)):
            table.seal(tokens, len(tokens))
        held.append(table)
        if len(held) > 3:
            held.pop(rng.randrange(4)).release()
        pool.check(deep=True)
    assert pool.evictions > 50


def test_a_parent_used_without_its_children_keeps_its_place() -> None:
    """A hot head whose only child is old: the child goes, the head stays."""
    pool = BlockPool(6, SIZE, policy="lru")
    use(pool, text(1, 2))
    for word in range(50, 80):
        use(pool, text(1))
        use(pool, text(word))
    assert is_cached(pool, text(1, 2)) == 1


def test_what_is_held_or_in_transfer_is_not_evicted_while_another_can_be() -> None:
    pool = BlockPool(4, SIZE)
    use(pool, text(1, 2))
    (leaf,) = pool.next_to_evict(1)
    pool.begin_transfer(leaf)
    use(pool, text(5, 6))
    for word in range(10, 14):
        use(pool, text(word))
        assert is_cached(pool, text(1, 2)) == 2
    pool.end_transfer(leaf)
    use(pool, text(20))
    assert is_cached(pool, text(1, 2)) == 1
    pool.check(deep=True)


def test_transfers_give_way_when_nothing_else_is_left() -> None:
    pool = BlockPool(4, SIZE)
    use(pool, text(1, 2, 3, 4))
    for block in pool.next_to_evict(4):
        pool.begin_transfer(block)
    generation = pool.generation(BlockId(0))
    assert pool.allocate(4) is not None
    assert pool.generation(BlockId(0)) > generation
    for block in range(4):
        pool.end_transfer(BlockId(block))
    pool.check(deep=True)
