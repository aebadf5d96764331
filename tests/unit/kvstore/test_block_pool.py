"""The pool's public face: what is given, found, refused, evicted and told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from kvstore.block import NO_BLOCK, BlockId, BlockKey, BrokenInvariant
from kvstore.block_pool import BlockPool
from kvstore.events import BlocksRemoved, BlocksStored, Cleared
from kvstore.scope import ScopeRoot

ROOT, OTHER_ROOT = ScopeRoot(b"r" * 16), ScopeRoot(b"o" * 16)
TOKENS, OTHER_TOKENS = bytes(16), bytes([1] * 16)


def key(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(16, "big"))


def block_tokens(number: int) -> bytes:
    return number.to_bytes(16, "little")


def find(pool: BlockPool, key: BlockKey, root: ScopeRoot, parent: BlockId, tokens: bytes) -> BlockId | None:
    return pool.contents.find(key, root, pool.number(parent), tokens)


def sealed_chain(pool: BlockPool, length: int, first: int = 0) -> list[BlockId]:
    """`length` sealed blocks, each the parent of the next, still held."""
    blocks = pool.allocate(length)
    assert blocks is not None
    parent = NO_BLOCK
    for number, block in enumerate(blocks, first):
        assert pool.seal(block, key(number), ROOT, parent, block_tokens(number)) == block
        parent = block
    return blocks


def test_allocate_all_or_nothing() -> None:
    pool = BlockPool(4, 4)
    assert pool.allocate(5) is None and pool.num_free == 4
    blocks = pool.allocate(3)
    assert blocks is not None and len(set(blocks)) == 3
    assert (pool.num_free, pool.num_cached, pool.num_referenced) == (1, 0, 3)
    assert pool.allocate(2) is None
    assert pool.allocate(0) == []
    pool.check(deep=True)


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0)])
def test_no_empty_pool(blocks: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(blocks, size)


def test_a_released_block_is_found_again_until_it_is_evicted() -> None:
    pool = BlockPool(2, 4)
    (block,) = sealed_chain(pool, 1)
    pool.release([block])
    assert pool.num_cached == 1 and pool.is_sealed(block)
    assert find(pool, key(0), ROOT, NO_BLOCK, block_tokens(0)) == block
    pool.acquire([block])
    assert pool.references(block) == 1 and pool.num_cached == 0
    pool.release([block])
    assert pool.allocate(2) is not None
    assert find(pool, key(0), ROOT, NO_BLOCK, block_tokens(0)) is None
    assert pool.evictions == 1


@pytest.mark.parametrize(
    ("root", "parent_is", "tokens"),
    [
        (OTHER_ROOT, "parent", block_tokens(1)),
        (ROOT, "none", block_tokens(1)),
        (ROOT, "other", block_tokens(1)),
        (ROOT, "parent", block_tokens(2)),
    ],
)
def test_a_hit_needs_scope_parent_and_tokens(root: ScopeRoot, parent_is: str, tokens: bytes) -> None:
    """The key is the same each time, as a crafted collision would have it."""
    pool = BlockPool(8, 4)
    parent, child = sealed_chain(pool, 2)
    (other,) = sealed_chain(pool, 1, first=7)
    parents = {"parent": parent, "none": NO_BLOCK, "other": other}
    assert find(pool, key(1), ROOT, parent, block_tokens(1)) == child and pool.contents.collisions == 0
    assert find(pool, key(1), root, parents[parent_is], tokens) is None
    assert pool.contents.collisions == 1
    assert find(pool, key(1), ROOT, parent, block_tokens(1)) == child


def test_a_hit_needs_the_parents_content() -> None:
    """A child that says block 0, and means an earlier content of block 0, is no hit."""
    pool = BlockPool(4, 4)
    parent, child = sealed_chain(pool, 2)
    number = pool.contents.numbers[parent]
    pool.contents.numbers[parent] = 99
    assert find(pool, key(1), ROOT, parent, block_tokens(1)) is None
    pool.contents.numbers[parent] = number
    assert find(pool, key(1), ROOT, parent, block_tokens(1)) == child


def test_same_content_twice_keeps_the_first() -> None:
    pool = BlockPool(4, 4)
    (first,) = sealed_chain(pool, 1)
    second = pool.allocate(1)
    assert second is not None
    assert pool.seal(second[0], key(0), ROOT, NO_BLOCK, block_tokens(0)) == first
    assert not pool.is_sealed(second[0]) and pool.contents.collisions == 0
    pool.release(second)
    assert pool.num_cached == 0


def test_a_collision_keeps_the_resident() -> None:
    pool = BlockPool(4, 4)
    (first,) = sealed_chain(pool, 1)
    second = pool.allocate(1)
    assert second is not None
    assert pool.seal(second[0], key(0), ROOT, NO_BLOCK, TOKENS[:-1] + b"\x09") is None
    assert pool.contents.collisions == 1 and not pool.is_sealed(second[0])
    assert find(pool, key(0), ROOT, NO_BLOCK, block_tokens(0)) == first


def test_eviction_takes_empty_blocks_first_then_the_oldest_leaf() -> None:
    pool = BlockPool(6, 4)
    old, young = sealed_chain(pool, 2), sealed_chain(pool, 2, first=10)
    pool.release(old[::-1])
    pool.release(young[::-1])
    pool.acquire(old[:1])  # the parent is used again, then given back: now it is the youngest
    pool.release(old[:1])
    pool.take_events()
    gone: list[bytes] = []
    for _ in range(6):
        assert pool.allocate(1) is not None
        for event in pool.take_events():
            assert isinstance(event, BlocksRemoved)
            gone += event.keys
    assert gone == [key(1), key(11), key(10), key(0)]


def test_misuse_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(4, 4)
    held, cached = sealed_chain(pool, 2)
    pool.release([cached])
    free = next(BlockId(block) for block in range(4) if block not in (held, cached))
    actions: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (pool.release, ([free],)),
        (pool.release, ([held, cached],)),
        (pool.release, ([held, held],)),
        (pool.release, ([held, BlockId(99)],)),
        (pool.release, ([BlockId(-1)],)),
        (pool.acquire, ([held, free],)),
        (pool.acquire, ([BlockId(4)],)),
        (pool.seal, (held, key(5), ROOT, NO_BLOCK, TOKENS)),  # sealed already
        (pool.seal, (free, key(5), ROOT, NO_BLOCK, TOKENS)),
    ]
    for action, arguments in actions:
        with pytest.raises(BrokenInvariant):
            action(*arguments)
        assert (pool.num_free, pool.num_cached, pool.num_referenced) == (2, 1, 1)
        assert pool.references(held) == 1 and pool.references(cached) == 0
        pool.check(deep=True)


def test_only_private_full_blocks_with_a_sealed_parent_are_sealed() -> None:
    pool = BlockPool(4, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    with pytest.raises(BrokenInvariant, match="not full"):
        pool.seal(blocks[0], key(0), ROOT, NO_BLOCK, TOKENS[:-4])
    with pytest.raises(BrokenInvariant, match="parent"):
        pool.seal(blocks[1], key(1), ROOT, blocks[0], TOKENS)
    pool.acquire(blocks[:1])
    with pytest.raises(BrokenInvariant, match="shared"):
        pool.seal(blocks[0], key(0), ROOT, NO_BLOCK, TOKENS)


def test_events_tell_the_net_change() -> None:
    pool = BlockPool(2, 4)
    assert pool.take_events() == []
    chain = sealed_chain(pool, 2)
    assert pool.take_events() == [BlocksStored([key(0), key(1)])]
    pool.release(chain[::-1])
    again = sealed_chain(pool, 1, first=5)  # evicts block 1's content
    pool.release(again)
    assert pool.take_events() == [BlocksRemoved([key(1)]), BlocksStored([key(5)])]
    for number in range(100, 200):  # stored and gone between two looks
        pool.release(sealed_chain(pool, 1, first=number))
    (removed, stored) = pool.take_events()
    assert isinstance(removed, BlocksRemoved) and isinstance(stored, BlocksStored)
    assert set(removed.keys) == {key(0), key(5)} and set(stored.keys) == set(pool.sealed_keys()) == {key(198), key(199)}


def test_clear_forgets_what_nobody_holds() -> None:
    pool = BlockPool(8, 4)
    held, gone = sealed_chain(pool, 2), sealed_chain(pool, 3, first=10)
    pool.release(gone[::-1])
    pool.take_events()
    generations = [pool.generation(block) for block in gone]
    pool.clear()
    assert pool.num_cached == 0 and pool.num_sealed == 2
    assert all(pool.generation(block) > old for block, old in zip(gone, generations, strict=True))
    (event,) = pool.take_events()
    assert isinstance(event, BlocksRemoved) and set(event.keys) == {key(10), key(11), key(12)}
    pool.release(held[::-1])
    pool.clear()
    pool.release(sealed_chain(pool, 1, first=20))
    assert pool.take_events() == [Cleared(), BlocksStored([key(20)])]
    pool.check(deep=True)


def test_without_reuse_nothing_is_kept() -> None:
    pool = BlockPool(2, 4, reuse=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    assert pool.seal(blocks[0], key(0), ROOT, NO_BLOCK, TOKENS) is None
    pool.release(blocks)
    assert pool.num_free == 2 and pool.take_events() == [] and pool.contents.collisions == 0


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda pool: pool._references.__setitem__(0, 5), "referenced"),
        (lambda pool: setattr(pool, "_num_cached", 5), "cached"),
        (lambda pool: pool._free.append(0), "queue"),
        (lambda pool: pool._free.__setitem__(0, 0), "queue"),
        (lambda pool: pool._free.__setitem__(0, pool._free[1]), "queue"),
        (lambda pool: pool.contents.by_key.__setitem__(key(0), 1), "key map"),
        (lambda pool: pool.contents.keys.__setitem__(0, None), "key map"),
        (lambda pool: pool.contents.numbers.__setitem__(0, 99), "parent"),
        (lambda pool: pool.contents.numbers.__setitem__(0, pool.contents.numbers[1]), "number"),
        (lambda pool: pool.contents.children.remove(0, 0), "below"),
        (lambda pool: pool._order.erase(2), "order"),
        (lambda pool: setattr(pool._order, "_num_protected", 1), "protected"),
        (lambda pool: setattr(pool._owner(0), "charge", 2), "sum"),
        (lambda pool: setattr(pool._owner(0), "held", 1), "owner"),
        (lambda pool: setattr(pool._ledger, "unmet", 1), "floors"),
    ],
)
def test_check_sees_damage(damage: Callable[[BlockPool], None], says: str) -> None:
    pool = BlockPool(8, 4)
    chain = sealed_chain(pool, 3)
    pool.check(deep=True)
    pool.release(chain[2:])
    pool.check(deep=True)
    if says == "referenced":
        pool.release([chain[1], chain[0]])
        pool.check(deep=True)
    damage(pool)
    with pytest.raises(BrokenInvariant, match=says):
        pool.check(deep=True)


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of Python the action executes: what it costs, without a clock."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


def test_cost_per_block_does_not_depend_on_the_pools_size() -> None:
    def cost(num_blocks: int, count: int) -> tuple[int, int, int, int]:
        pool = BlockPool(num_blocks, 4)
        pool.release(sealed_chain(pool, num_blocks)[::-1])  # everything is cached: allocation evicts
        chain = [BlockId(block) for block in range(count)]
        touch = lines_run(lambda: pool.acquire(chain))
        free = lines_run(lambda: pool.release(chain[::-1]))
        take = lines_run(lambda: pool.allocate(count))
        look = lines_run(lambda: find(pool, key(0), ROOT, NO_BLOCK, block_tokens(0)))
        return touch, free, take, look

    assert cost(64, 16) == cost(4096, 16)
    assert max(cost(4096, 32)) <= 2 * max(cost(4096, 16))
