"""One suite for every prefix index: the one in memory, and the one that comes through Redis and a mirror."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence

import pytest

from kvstore.block import BlockKey, WorkerId
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared, Event, TierChanged
from kvstore.index import CachedPrefix, PrefixIndex
from kvstore.lease import Fenced, Lease, LeaseKeeper, connect
from kvstore.ledger import Ledger, Position
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror, MirrorTimes
from kvstore.redis_index import RedisIndexWriter

A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


class ThroughRedis:
    """Writes as workers do and reads what a mirror has made of it."""

    def __init__(self, url: str) -> None:
        self._client = connect(url)
        self._keeper = LeaseKeeper(self._client, "contract", ttl_s=60)
        self._writers: dict[WorkerId, RedisIndexWriter] = {}
        self._index = MemoryIndex()
        self._loop = asyncio.new_event_loop()
        times = MirrorTimes(poll=0.01, block=0.01, reload=0.01)
        self._mirror = Mirror(url, "contract", self._index, times=times)
        self._loop.run_until_complete(self._mirror.start())

    def apply(self, worker: WorkerId, epoch: int, events: Iterable[Event]) -> None:
        writer = self._writers.get(worker)
        if writer is None or writer.ledger.epoch != epoch:
            writer = RedisIndexWriter(self._client, "contract", Ledger(worker, epoch), capacity=1000)
        try:
            self._keeper.renew(_lease(worker, epoch, writer.acknowledged))
            writer.repair()
            writer.publish(list(events))
        except Fenced:
            return
        self._writers[worker] = writer
        self._keeper.renew(_lease(worker, epoch, writer.acknowledged))

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, CachedPrefix]:
        self._catch_up()
        return self._index.match(keys)

    def remove_worker(self, worker: WorkerId) -> None:
        self._keeper.release(worker, self._writers.pop(worker).ledger.epoch)

    def num_blocks(self, worker: WorkerId) -> int:
        self._catch_up()
        return self._index.num_blocks(worker)

    def _catch_up(self) -> None:
        wanted = {worker: (writer.ledger.epoch, writer.acknowledged.seq) for worker, writer in self._writers.items()}

        async def wait() -> None:
            async with asyncio.timeout(10):
                while self._mirror.position() != wanted:
                    await asyncio.sleep(0.005)

        self._loop.run_until_complete(wait())

    def close(self) -> None:
        self._loop.run_until_complete(self._mirror.stop())
        self._loop.close()
        self._client.close()


def _lease(worker: WorkerId, epoch: int, at: Position) -> Lease:
    return Lease(
        worker_id=worker, epoch=epoch, address="", model="", block_size=16, key_fingerprint="", model_fingerprint="",
        pid=1, device_blocks=1000, max_model_len=1, vocab_size=1,
        seq=at.seq, num_blocks=at.num_blocks, digest=at.digest,
    )  # fmt: skip


@pytest.fixture(params=["memory", "redis"])
def index(request: pytest.FixtureRequest) -> Iterator[PrefixIndex]:
    if request.param == "memory":
        yield MemoryIndex()
        return
    through = ThroughRedis(request.getfixturevalue("redis_url"))
    yield through
    through.close()


def keys(count: int, first: int = 0) -> list[BlockKey]:
    return [BlockKey(number.to_bytes(16, "little")) for number in range(first, first + count)]


def stored(count: int, first: int = 0, tier: int = DEVICE) -> BlocksStored:
    return BlocksStored(list(keys(count, first)), tier)


def removed(count: int, first: int = 0, tier: int = DEVICE) -> BlocksRemoved:
    return BlocksRemoved(list(keys(count, first)), tier)


def test_nothing_is_known_at_first(index: PrefixIndex) -> None:
    assert index.match(keys(10)) == {} and index.match([]) == {}
    assert index.num_blocks(A) == 0


def test_longest_prefix_of_each_worker(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(7)])
    index.apply(B, 1, [stored(100)])
    index.apply(C, 1, [stored(5, first=200)])
    assert index.match(keys(50)) == {A: CachedPrefix(7), B: CachedPrefix(50)}
    assert index.match(keys(7)) == {A: CachedPrefix(7), B: CachedPrefix(7)}
    assert index.match(keys(9, first=200)) == {C: CachedPrefix(5)}
    assert index.match([]) == {}


@pytest.mark.parametrize("depth", [1, 2, 3, 63, 64, 65])
def test_every_depth(index: PrefixIndex, depth: int) -> None:
    index.apply(A, 1, [stored(depth)])
    assert index.match(keys(64)) == {A: CachedPrefix(min(depth, 64))}


def test_removed_leaves_shorten_the_prefix(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(10)])
    index.apply(A, 1, [removed(4, first=6)])
    assert index.match(keys(10)) == {A: CachedPrefix(6)} and index.num_blocks(A) == 6
    index.apply(A, 1, [removed(6)])
    assert index.match(keys(10)) == {}


def test_tiers(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(6), TierChanged(list(keys(2, first=4)), CPU), stored(3, first=3, tier=CPU)])
    index.apply(B, 1, [stored(2, tier=CPU)])
    assert index.match(keys(10)) == {A: CachedPrefix(4, 2), B: CachedPrefix(0, 2)}
    assert index.num_blocks(A) == 4 + 3
    index.apply(A, 1, [TierChanged(list(keys(1, first=4)), DEVICE), removed(1, first=5, tier=CPU)])
    assert index.match(keys(10))[A] == CachedPrefix(5)
    index.apply(A, 1, [removed(1, first=3, tier=CPU)])
    assert index.match(keys(10))[A] == CachedPrefix(5) and index.num_blocks(A) == 5


def test_applying_twice_is_applying_once(index: PrefixIndex) -> None:
    for _ in range(2):
        index.apply(A, 1, [stored(5)])
    assert index.num_blocks(A) == 5
    for _ in range(2):
        index.apply(A, 1, [removed(2, first=3)])
    assert index.num_blocks(A) == 3 and index.match(keys(5)) == {A: CachedPrefix(3)}


def test_cleared(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(5), stored(5, tier=CPU)])
    index.apply(B, 1, [stored(3)])
    index.apply(A, 1, [Cleared(), stored(2)])
    assert index.match(keys(5)) == {A: CachedPrefix(2), B: CachedPrefix(3)} and index.num_blocks(A) == 2


def test_a_new_epoch_voids_the_old_one_and_the_old_one_is_refused(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(5)])
    index.apply(B, 1, [stored(4)])
    index.apply(A, 2, [])
    assert index.match(keys(5)) == {B: CachedPrefix(4)} and index.num_blocks(A) == 0
    index.apply(A, 2, [stored(2)])
    index.apply(A, 1, [stored(5), removed(1)])
    assert index.match(keys(5)) == {A: CachedPrefix(2), B: CachedPrefix(4)}


def test_a_removed_worker_is_gone_and_may_come_back(index: PrefixIndex) -> None:
    index.apply(A, 1, [stored(5)])
    index.apply(B, 1, [stored(5)])
    index.remove_worker(A)
    assert index.match(keys(5)) == {B: CachedPrefix(5)} and index.num_blocks(A) == 0
    index.apply(A, 2, [stored(1)])
    assert index.match(keys(5)) == {A: CachedPrefix(1), B: CachedPrefix(5)}


def test_rubbish_in_the_set_is_only_advice(index: PrefixIndex) -> None:
    """A worker that reports blocks without their parents costs a wrong guess, never an error."""
    index.apply(A, 1, [stored(1), stored(5, first=9), removed(50, first=300)])
    index.apply(B, 1, [stored(3, first=2)])
    found = index.match(keys(14))
    assert set(found) <= {A} and found[A].num_blocks <= 14
