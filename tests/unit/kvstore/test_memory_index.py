"""The index in memory: what only it has, beside the suite that every index passes."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import BlockKey, WorkerId
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared
from kvstore.index import CachedPrefix
from kvstore.memory_index import MemoryIndex


def keys(count: int, first: int = 0) -> list[BlockKey]:
    return [BlockKey(number.to_bytes(16, "little")) for number in range(first, first + count)]


def stored(count: int, first: int = 0, tier: int = DEVICE) -> BlocksStored:
    return BlocksStored(list(keys(count, first)), tier)


@given(st.dictionaries(st.integers(0, 70), st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=30))
def test_binary_search_equals_counting(held: dict[int, tuple[int, int]]) -> None:
    index = MemoryIndex()
    expected: dict[WorkerId, CachedPrefix] = {}
    for number, (device, both) in held.items():
        worker = WorkerId(f"w{number}")
        index.apply(worker, 1, [stored(device), stored(max(0, both - device // 2), device // 2, CPU)])
        total = max(device, both)
        if total:
            expected[worker] = CachedPrefix(device, total - device)
    assert index.match(keys(40)) == expected
    assert index.match(keys(1)) == {
        worker: CachedPrefix(min(1, prefix.device_blocks), 1 - min(1, prefix.device_blocks))
        for worker, prefix in expected.items()
    }


def test_dropped_workers_are_swept_and_their_place_is_used_again() -> None:
    index = MemoryIndex()
    stay, go = WorkerId("stay"), WorkerId("go")
    index.apply(stay, 1, [stored(5000)])
    for life in range(1, 50):
        index.apply(go, life, [stored(6000)])
        index.remove_worker(go)
        assert index.match(keys(6000)) == {stay: CachedPrefix(5000)}
        while index.sweep():
            pass
        assert len(index) == 5000
    assert len(index._names) <= 3
    assert index.num_blocks(stay) == 5000


def test_events_go_on_while_a_sweep_is_under_way() -> None:
    rng = random.Random(3)
    index = MemoryIndex()
    go, stay = WorkerId("go"), WorkerId("stay")
    held: set[bytes] = set()
    index.apply(go, 1, [stored(9000)])
    index.remove_worker(go)
    for _ in range(60):
        some = rng.sample(keys(9000), 40)
        if rng.random() < 0.6:
            index.apply(stay, 1, [BlocksStored(list(some))])
            held |= set(some)
        else:
            index.apply(stay, 1, [BlocksRemoved(list(some))])
            held -= set(some)
        if rng.random() < 0.1:
            index.apply(go, 1, [stored(100)])
            index.remove_worker(go)
    assert index.keys_of(stay) == held and index.num_blocks(stay) == len(held)
    while index.sweep():
        pass
    assert len(index) == len(held)


def test_a_load_takes_its_place_when_it_is_committed() -> None:
    index = MemoryIndex()
    worker = WorkerId("w")
    index.apply(worker, 1, [stored(10)])
    loading = index.load(worker, 1)
    loading.store(DEVICE, list(keys(4)))
    assert index.match(keys(10)) == {worker: CachedPrefix(10)}
    loading.store(DEVICE, list(keys(2, 4)))
    loading.commit()
    assert index.match(keys(10)) == {worker: CachedPrefix(6)} and index.num_blocks(worker) == 6
    abandoned = index.load(worker, 1)
    abandoned.store(CPU, list(keys(10)))
    abandoned.abandon()
    assert index.match(keys(10)) == {worker: CachedPrefix(6)}
    while index.sweep():
        pass
    assert len(index) == 6


def test_workers_and_length() -> None:
    index = MemoryIndex()
    assert index.workers() == [] and len(index) == 0 and not index.sweep()
    index.apply(WorkerId("a"), 1, [stored(3), stored(2, 2, CPU)])
    index.apply(WorkerId("b"), 1, [Cleared()])
    assert index.workers() == ["a", "b"] and len(index) == 4
    assert index.keys_of(WorkerId("a"), CPU) == set(keys(2, 2)) and index.keys_of(WorkerId("none")) == set()


def test_many_masks_do_not_pile_up() -> None:
    index = MemoryIndex()
    for number in range(12):
        index.apply(WorkerId(f"w{number}"), 1, [Cleared()])
    for mask in range(1, 4096):
        key = mask.to_bytes(16, "big")
        for number in range(12):
            if mask >> number & 1:
                index.apply(WorkerId(f"w{number}"), 1, [BlocksStored([key])])
        assert len(index.match([BlockKey(key)])) == mask.bit_count()
    assert len(index._workers_of) <= 2048
