"""A worker's side of the index: batches with numbers and digests, what is kept of them, and who listens."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import WorkerId
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared, Event, TierChanged, decode, num_keys
from kvstore.ledger import KEYS_PER_BATCH, Ledger, SnapshotPart, Told
from kvstore.memory_index import MemoryIndex

W = WorkerId("w")
KEYS = [hashlib.blake2b(bytes([number]), digest_size=16).digest() for number in range(12)]
SOME = st.lists(st.sampled_from(KEYS), max_size=6)
TIER = st.sampled_from((DEVICE, CPU))
EVENTS = st.one_of(
    st.builds(BlocksStored, SOME, TIER), st.builds(BlocksRemoved, SOME, TIER), st.builds(TierChanged, SOME, TIER),
    st.just(Cleared()),
)  # fmt: skip


def many(count: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in range(count)]


@given(st.lists(st.lists(EVENTS, max_size=3), max_size=12))
def test_both_sides_have_the_same_digest_after_every_batch(steps: list[list[Event]]) -> None:
    ledger, index = Ledger("w", 1), MemoryIndex()
    for events in steps:
        for recorded in ledger.record(events):
            batch = decode(recorded.payload)
            index.apply(W, batch.epoch, batch.events)
            assert batch.digest == index.digest(W) == recorded.position.digest
            assert recorded.position.num_blocks == index.num_blocks(W)
    assert all(index.keys_of(W, tier) == set(ledger.keys(tier)) for tier in (DEVICE, CPU) if W in index.workers())


@given(SOME, SOME, TIER)
def test_a_digest_tells_sets_and_tiers_apart(one: list[bytes], other: list[bytes], tier: int) -> None:
    digests = []
    for keys, where in ((one, DEVICE), (other, tier)):
        ledger = Ledger("w", 1)
        ledger.record([BlocksStored(keys, where)])
        digests.append(ledger.position.digest)
    assert (digests[0] == digests[1]) == (set(one) == set(other) and (tier == DEVICE or not one))


def test_what_was_missed_is_kept_within_bounds() -> None:
    ledger = Ledger("w", 1, kept_keys=40, kept_batches=100)
    for first in range(0, 100, 10):
        ledger.record([BlocksStored(many(100)[first : first + 10])])
    assert [decode(recorded.payload).seq for recorded in ledger.since(7) or ()] == [8, 9, 10]
    assert ledger.since(10) == []
    assert ledger.since(5) is None and ledger.since(11) is None and ledger.since(0) is None
    assert ledger.mark().position.seq == 11 and len(ledger.since(10) or ()) == 1


def test_a_large_change_is_cut_into_batches() -> None:
    ledger = Ledger("w", 1)
    recorded = ledger.record([BlocksStored(many(2 * KEYS_PER_BATCH + 5)), BlocksRemoved(many(3))])
    assert [num_keys(part.events) for part in recorded] == [KEYS_PER_BATCH, KEYS_PER_BATCH, 5 + 3]
    assert ledger.record([]) == [] and ledger.position.num_blocks == 2 * KEYS_PER_BATCH + 2


def test_a_listener_gets_what_it_missed_or_all_and_then_every_batch() -> None:
    ledger = Ledger("w", 1)
    ledger.record([BlocksStored(many(5))])
    ledger.record([BlocksStored(many(7), CPU)])
    heard: list[Told] = []
    ledger.follow(heard.append, 1)
    assert [decode(payload).seq for payload in heard[0]] == [2]  # type: ignore[union-attr]
    ledger.follow(heard.append, 2)
    assert len(heard) == 1
    ledger.record([Cleared()])
    assert len(heard) == 2, "it is told once, however often it asked"
    ledger.unfollow(heard.append)
    ledger.unfollow(heard.append)
    ledger.record([BlocksStored(many(3))])
    assert len(heard) == 2
    ledger.record([BlocksStored(many(2), CPU)])
    ledger.follow(heard.append, 0)
    parts = [part for part in heard[2:] if isinstance(part, SnapshotPart)]
    assert [(part.tier, len(part.keys), part.is_first, part.is_last) for part in parts] == [
        (DEVICE, 48, True, False), (CPU, 32, False, True),
    ]  # fmt: skip
    assert {part.position for part in parts} == {ledger.position}
