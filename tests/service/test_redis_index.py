"""Workers that publish to a real Redis, and the mirror that follows them: faults included."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import pytest
import redis

from kvstore import redis_scripts
from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys
from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared, Event, EventBatch, TierChanged, encode
from kvstore.index import CachedPrefix
from kvstore.lease import (
    Fenced,
    Lease,
    LeaseKeeper,
    connect,
    redis_key,
    take_epoch,
    view_leases,
    workers_key,
)
from kvstore.ledger import Ledger
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror, MirrorTimes
from kvstore.redis_index import RedisIndexReader, RedisIndexWriter
from kvstore.scope import Region, ScopeRoot

CLUSTER = "test"
FAST = MirrorTimes(poll=0.05, block=0.05, timeout=0.3, grace=0.6, reload=0.1, backoff_first=0.02, backoff_most=0.1)
REGIONS = [Region(ScopeRoot(bytes(16)), None)]


def keys(*names: object) -> list[bytes]:
    return [hashlib.blake2b(repr(name).encode(), digest_size=16).digest() for name in names]


class Life:
    """One life of a worker, as its publisher thread would run it."""

    def __init__(
        self, url: str, name: str = "w0", *, capacity: int = 1000, ttl_s: float = 10.0, **options: Any
    ) -> None:
        self.client: Any = connect(url, timeout_s=0.3)
        self.name = WorkerId(name)
        self.epoch = take_epoch(self.client, CLUSTER, name)
        self.keeper = LeaseKeeper(self.client, CLUSTER, ttl_s=ttl_s)
        self.writer = RedisIndexWriter(self.client, CLUSTER, Ledger(name, self.epoch), capacity=capacity, **options)

    @property
    def lease(self) -> Lease:
        at = self.writer.acknowledged
        return Lease(
            worker_id=self.name, epoch=self.epoch, address=f"127.0.0.1:{self.epoch}", model="m", block_size=16,
            key_fingerprint="k", model_fingerprint="f", pid=self.epoch, device_blocks=1000, max_model_len=4096,
            vocab_size=100, seq=at.seq, num_blocks=at.num_blocks, digest=at.digest,
        )  # fmt: skip

    def beat(self) -> bool:
        self.keeper.renew(self.lease)
        return self.writer.repair()

    def try_beat(self) -> bool:
        try:
            return self.beat()
        except redis.RedisError:
            return False

    def store(self, *names: object, tier: int = DEVICE) -> bool:
        return self.writer.publish([BlocksStored(keys(*names), tier)])

    def remove(self, *names: object) -> bool:
        return self.writer.publish([BlocksRemoved(keys(*names))])


@pytest.fixture
def begin(redis_url: str) -> Iterator[Callable[..., Life]]:
    lives: list[Life] = []

    def make(name: str = "w0", *, url: str = redis_url, **options: Any) -> Life:
        life = Life(url, name, **options)
        lives.append(life)
        return life

    yield make
    for life in lives:
        life.client.close()


@contextmanager
def losing_batches(life: Life) -> Iterator[None]:
    """What is published reaches the current set and not the stream, as if it had been trimmed away unread."""
    script = life.writer._publish
    life.writer._publish = life.client.register_script(
        redis_scripts.FENCE + redis_scripts.PUBLISH.replace("append(ARGV[5], ARGV[6])", "")
    )
    yield
    life.writer._publish = script


@asynccontextmanager
async def following(url: str, **options: Any) -> AsyncIterator[tuple[Mirror, MemoryIndex]]:
    index = MemoryIndex()
    mirror = Mirror(url, CLUSTER, index, times=FAST, **options)
    before = asyncio.all_tasks()
    await mirror.start()
    try:
        yield mirror, index
    finally:
        await mirror.stop()
        assert asyncio.all_tasks() == before


async def until(condition: Callable[[], object], *, beat: Callable[[], object] = lambda: None) -> None:
    async with asyncio.timeout(10):
        while not condition():
            beat()
            await asyncio.sleep(0.02)


async def stays(condition: Callable[[], object], seconds: float) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < end:
        assert condition()
        await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_mirror_equals_the_published_set(redis_url: str, begin: Callable[..., Life]) -> None:
    life = begin()
    life.beat()
    life.store(*range(300))
    life.remove(*range(250, 300))
    async with following(redis_url) as (mirror, index):
        assert mirror.connected and life.name in mirror.position()
        assert index.keys_of(life.name) == set(keys(*range(250)))
        life.store("a", "b")
        life.remove(249)
        await until(lambda: index.keys_of(life.name) == set(keys(*range(249), "a", "b")))
        assert mirror.counts.gaps == 0 and mirror.counts.loads == 1 and mirror.counts.batches == 2


@pytest.mark.asyncio
async def test_tiers_travel(redis_url: str, begin: Callable[..., Life]) -> None:
    life = begin()
    life.beat()
    async with following(redis_url) as (_, live):
        life.store(1, 2, 3)
        life.writer.publish([TierChanged(keys(3), CPU), BlocksStored(keys(2), CPU)])
        chain = [BlockKey(key) for key in keys(1, 2, 3)]
        await until(lambda: live.match(chain) == {life.name: CachedPrefix(2, 1)})
        async with following(redis_url) as (_, loaded):
            assert loaded.match(chain) == {life.name: CachedPrefix(2, 1)}
            assert loaded.keys_of(life.name, CPU) == set(keys(2, 3))
            life.writer.publish([Cleared(), BlocksStored(keys(9))])
            await until(lambda: loaded.keys_of(life.name) == live.keys_of(life.name) == set(keys(9)))
        async with following(redis_url) as (_, late):
            assert late.keys_of(life.name) == set(keys(9)) and late.num_blocks(life.name) == 1


@pytest.mark.asyncio
async def test_pool_to_mirror(redis_url: str, begin: Callable[..., Life]) -> None:
    """Random sequences on a small pool: what the mirror knows is what the pool has sealed."""
    life = begin(capacity=64)
    life.beat()
    rng = random.Random(7)
    pool = BlockPool(64, 4)
    async with following(redis_url) as (mirror, index):
        for _ in range(150):
            prompt = array("I", [rng.randrange(3) for _ in range(rng.randrange(4, 60))])
            table = BlockTable(pool, REGIONS)
            table.attach_prefix(prompt, len(prompt) - 1)
            assert table.reserve(len(prompt))
            table.seal(prompt, len(prompt))
            table.release()
            life.writer.publish(pool.take_events())
            await asyncio.sleep(0)
        await until(lambda: index.keys_of(life.name) == set(pool.sealed_keys()))
        assert mirror.counts.gaps == 0 and pool.evictions > 0
        best = array("I", prompt)
        whole = block_keys(REGIONS, best, 4)
        assert index.match(whole) == {life.name: CachedPrefix(len(whole))}


@pytest.mark.asyncio
async def test_a_new_life_voids_the_old_one_at_once(redis_url: str, begin: Callable[..., Life]) -> None:
    """As after SIGKILL: no word of farewell, the lease still stands."""
    old = begin()
    old.beat()
    old.store(*range(50))
    async with following(redis_url) as (mirror, index):
        assert index.num_blocks(old.name) == 50
        new = begin()
        assert new.epoch == old.epoch + 1
        new.keeper.renew(new.lease)
        await until(lambda: mirror.leases()[old.name].epoch == new.epoch)
        assert index.num_blocks(old.name) == 0
        new.beat()
        new.store("fresh")
        await until(lambda: index.keys_of(new.name) == set(keys("fresh")))
    client = new.client
    assert not list(client.keys(f"{CLUSTER}:*:set:{old.epoch}.*"))


@pytest.mark.asyncio
async def test_a_fenced_writer_changes_nothing(redis_url: str, begin: Callable[..., Life]) -> None:
    old = begin()
    old.beat()
    new = begin()
    new.beat()
    new.store("mine")
    async with following(redis_url) as (_, index):
        acts: list[Callable[[], object]] = [
            lambda: old.store("stale"), old.writer.repair, old.writer.publish_snapshot, old.beat,
        ]  # fmt: skip
        for act in acts:
            with pytest.raises(Fenced):
                act()
        old.keeper.release(old.name, old.epoch)
        await asyncio.sleep(0.2)
        assert index.keys_of(new.name) == set(keys("mine"))
        assert new.store("more") and new.beat()
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        assert [lease.epoch for lease in (await view_leases(client, CLUSTER)).leases.values()] == [new.epoch]


@pytest.mark.asyncio
async def test_a_gap_is_repaired_by_reading_that_worker_alone(redis_url: str, begin: Callable[..., Life]) -> None:
    one, two = begin("w1"), begin("w2")
    for life in (one, two):
        life.beat()
        life.store("base", life.name)
    async with following(redis_url) as (mirror, index):
        loads = mirror.counts.loads
        with losing_batches(one):
            one.store("lost")
        one.store("after")
        await until(lambda: index.keys_of(one.name) == set(keys("base", "w1", "lost", "after")))
        assert index.keys_of(two.name) == set(keys("base", "w2"))
        assert mirror.counts.gaps == 1 and mirror.counts.loads == loads + 1


@pytest.mark.asyncio
async def test_a_lost_last_batch_is_seen_by_the_lease(redis_url: str, begin: Callable[..., Life]) -> None:
    life = begin()
    life.beat()
    life.store("first")
    async with following(redis_url) as (mirror, index):
        with losing_batches(life):
            life.store("second")
        await asyncio.sleep(0.3)
        assert index.keys_of(life.name) == set(keys("first"))
        life.beat()
        await until(lambda: index.keys_of(life.name) == set(keys("first", "second")))
        assert mirror.counts.gaps == 1 and mirror.counts.loads == 2


@pytest.mark.asyncio
async def test_trimmed_streams_are_read_anew(redis_url: str, begin: Callable[..., Life]) -> None:
    life = begin(max_batches=10)
    life.beat()
    async with following(redis_url) as (mirror, index):
        for number in range(400):  # faster than the mirror, which gets no turn
            life.store(number)
        await until(lambda: index.keys_of(life.name) == set(keys(*range(400))))
        assert mirror.counts.gaps == 1
        assert life.client.xlen(redis_key(CLUSTER, life.name, "events")) < 400


@pytest.mark.asyncio
async def test_an_expired_lease_drops_the_worker(redis_url: str, begin: Callable[..., Life]) -> None:
    gone, stays_on = begin("w1", ttl_s=0.3), begin("w2")
    changes: list[tuple[str, int | None]] = []
    gone.beat(), stays_on.beat()
    gone.store(1), stays_on.store(1)
    async with following(
        redis_url, on_lease_change=lambda worker, lease: changes.append((worker, lease and lease.epoch))
    ) as (mirror, index):
        assert set(mirror.leases()) == {"w1", "w2"}
        await until(lambda: set(mirror.leases()) == {"w2"})
        assert index.match([BlockKey(keys(1)[0])]) == {WorkerId("w2"): CachedPrefix(1)}
        assert changes == [("w1", 1), ("w2", 1), ("w1", None)]


@pytest.mark.asyncio
async def test_a_released_lease_drops_the_worker(redis_url: str, begin: Callable[..., Life]) -> None:
    life = begin()
    life.beat()
    async with following(redis_url) as (mirror, _):
        life.keeper.release(life.name, life.epoch)
        await until(lambda: not mirror.leases())


@pytest.mark.asyncio
async def test_redis_killed_and_started_empty(own_redis: Any, begin: Callable[..., Life]) -> None:
    life = begin(url=own_redis.url)
    life.beat()
    life.store(*range(20))
    async with following(own_redis.url) as (mirror, index):
        everything = index.keys_of(life.name)
        own_redis.stop()
        await until(lambda: not mirror.connected)
        assert not life.store("while away")
        assert not life.writer.repair()
        await stays(lambda: index.keys_of(life.name) == everything and life.name in mirror.leases(), 0.5)
        own_redis.start()
        await until(lambda: mirror.connected)
        assert life.name in mirror.leases()
        await until(lambda: index.keys_of(life.name) == set(keys(*range(20), "while away")), beat=life.try_beat)
        assert life.writer.in_sync and life.store("later")
        await until(lambda: keys("later")[0] in index.keys_of(life.name))


@pytest.mark.asyncio
async def test_redis_flushed(redis_url: str, begin: Callable[..., Life]) -> None:
    alive, dead = begin("alive"), begin("dead")
    for life in (alive, dead):
        life.beat()
        life.store(*range(20))
    async with following(redis_url) as (mirror, index):
        alive.client.flushall()
        assert not alive.store("late")
        await stays(lambda: set(mirror.leases()) == {"alive", "dead"} and index.num_blocks(alive.name) >= 20, 0.2)
        assert alive.beat()
        await until(lambda: index.keys_of(alive.name) == set(keys(*range(20), "late")))
        # Who does not come back within the grace is dropped.
        await until(lambda: set(mirror.leases()) == {"alive"}, beat=alive.beat)
        assert take_epoch(alive.client, CLUSTER, "alive") == alive.epoch + 1


@pytest.mark.asyncio
async def test_redis_hangs(own_redis: Any, begin: Callable[..., Life]) -> None:
    life = begin(url=own_redis.url)
    life.beat()
    life.store(1)
    async with following(own_redis.url) as (mirror, index):
        os.kill(own_redis.process.pid, signal.SIGSTOP)
        try:
            await until(lambda: not mirror.connected)
            loop = asyncio.get_running_loop()
            started = loop.time()
            assert not await loop.run_in_executor(None, life.store, 2)
            assert loop.time() - started < 2
            assert index.keys_of(life.name) == set(keys(1))
        finally:
            os.kill(own_redis.process.pid, signal.SIGCONT)
        await until(lambda: index.keys_of(life.name) == set(keys(1, 2)), beat=life.try_beat)
        assert mirror.connected


@pytest.mark.asyncio
async def test_no_redis_at_start(own_redis: Any, begin: Callable[..., Life]) -> None:
    own_redis.stop()
    async with following(own_redis.url) as (mirror, index):
        assert not mirror.connected and mirror.leases() == {}
        own_redis.start()
        life = begin(url=own_redis.url)
        life.beat()
        life.store(1)
        await until(lambda: index.keys_of(life.name) == set(keys(1)))


@pytest.mark.asyncio
async def test_rubbish_in_redis_stops_nobody(redis_url: str, begin: Callable[..., Life]) -> None:
    good, bad = begin("good"), begin("bad")
    for life in (good, bad):
        life.beat()
        life.store(1)
    client = good.client
    async with following(redis_url) as (mirror, index):
        client.sadd(workers_key(CLUSTER), "liar", b"\xff\xfe", "mute")
        client.set(redis_key(CLUSTER, "liar", "lease"), b'{"worker_id": 7}')
        client.set(redis_key(CLUSTER, "mute", "lease"), msgspec.json.encode(good.lease))
        stream = redis_key(CLUSTER, "bad", "events")
        client.xadd(stream, {b"b": b"\xc1not msgpack"}, id=f"{bad.epoch}-{bad.writer.acknowledged.seq + 1}")
        client.xadd(stream, {b"x": b""}, id=f"{bad.epoch}-{bad.writer.acknowledged.seq + 2}")
        await until(lambda: mirror.counts.malformed >= 3)
        good.store(2)
        await until(lambda: index.keys_of(good.name) == set(keys(1, 2)))
        assert mirror.connected and set(mirror.leases()) == {"good", "bad"}
        client.delete(stream)
        client.set(stream, "no stream")
        await asyncio.sleep(0.2)
        good.store(3)
        await until(lambda: index.keys_of(good.name) == set(keys(1, 2, 3)))
        client.delete(stream)
        client.delete(redis_key(CLUSTER, "bad", "meta"))
        await until(lambda: bad.name in mirror.position(), beat=bad.beat)
        assert index.keys_of(bad.name) == set(keys(1))


@pytest.mark.asyncio
async def test_a_failing_listener_does_not_end_the_mirror(redis_url: str, begin: Callable[..., Life]) -> None:
    calls: list[str] = []

    def listener(worker: WorkerId, lease: Lease | None) -> None:
        calls.append(worker)
        if len(calls) == 1:
            raise KeyError("a defect elsewhere")

    life = begin()
    life.beat()
    async with following(redis_url, on_lease_change=listener) as (_, index):
        life.store(1)
        await until(lambda: index.keys_of(life.name) == set(keys(1)))


@pytest.mark.asyncio
async def test_snapshot_interrupted_and_superseded(redis_url: str, begin: Callable[..., Life]) -> None:
    """A half-written snapshot is invisible, and the next one cleans it up."""
    life = begin(capacity=5000)
    life.beat()
    life.store(*range(3000))
    reader_client = redis.asyncio.Redis.from_url(redis_url)
    reader = RedisIndexReader(reader_client, CLUSTER)
    before = await reader.current_set(life.name)
    assert before is not None
    never = life.client.register_script("return -1")
    commit, life.writer._commit = life.writer._commit, never
    assert not life.writer.publish_snapshot()
    life.writer._commit = commit
    assert await reader.current_set(life.name) == before
    assert life.writer.repair()
    with pytest.raises(LookupError):
        async for _ in reader.keys(life.name, before):
            pass
    current = await reader.current_set(life.name)
    assert current is not None and current.seq == life.writer.acknowledged.seq
    found = [key async for _, part in reader.keys(life.name, current) for key in part]
    assert sorted(found) == sorted(keys(*range(3000)))
    names = {name.split(b":")[3] for name in life.client.keys(f"{CLUSTER}:*:set:*")}
    assert names == {current.name.encode()}
    await reader_client.aclose()


def test_current_set_stays_packed(begin: Callable[..., Life]) -> None:
    life = begin(capacity=20_000)
    life.beat()
    for first in range(0, 20_000, 1000):
        life.store(*range(first, first + 1000))
    buckets = life.client.keys(f"{CLUSTER}:*:set:*")
    encodings = {life.client.object("encoding", name) for name in buckets}
    assert encodings <= {b"ziplist", b"listpack"}
    used = sum(life.client.memory_usage(name) or 0 for name in buckets)
    assert used / 20_000 < 40


def test_redis_holds_no_token_and_no_tenant(begin: Callable[..., Life]) -> None:
    life = begin()
    life.beat()
    life.store(1)
    names = life.client.keys("*")
    assert all(name.startswith(b"test:") for name in names)
    entries = life.client.xrange(redis_key(CLUSTER, life.name, "events"))
    assert entries[-1][1] == {
        b"b": encode(
            EventBatch("w0", life.epoch, life.writer.acknowledged.seq, [BlocksStored(keys(1))], life.lease.digest)
        )
    }


def test_a_large_publication_is_cut_into_batches(begin: Callable[..., Life]) -> None:
    life = begin(capacity=30_000)
    life.beat()
    before = life.writer.acknowledged.seq
    events: list[Event] = [BlocksStored(keys(*range(10_000))), BlocksRemoved(keys(*range(5))), Cleared()]
    assert life.writer.publish(events) and life.writer.publish([])
    assert life.writer.acknowledged.seq == before + 3
    assert life.writer.ledger.position.num_blocks == 0


def test_epochs_grow_and_each_worker_has_its_own(begin: Callable[..., Life]) -> None:
    assert [begin("w1").epoch, begin("w1").epoch, begin("w2").epoch] == [1, 2, 1]


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", [0, 15, 23])
async def test_random_faults_then_quiet(redis_url: str, begin: Callable[..., Life], seed: int) -> None:
    """Batches lost, streams and Redis itself emptied, workers restarted: then the mirror equals the workers again."""
    rng = random.Random(seed)
    lives = {name: begin(name) for name in ("w1", "w2", "w3")}
    truth: dict[str, set[bytes]] = {name: set() for name in lives}
    for life in lives.values():
        life.beat()
    async with following(redis_url) as (mirror, index):
        for _ in range(250):
            name = rng.choice(list(lives))
            life = lives[name]
            some = set(keys(*rng.sample(range(60), 6)))
            event: Event = BlocksStored(sorted(some)) if rng.random() < 0.6 else BlocksRemoved(sorted(some))
            truth[name] = truth[name] | some if isinstance(event, BlocksStored) else truth[name] - some
            if rng.random() < 0.1:
                with losing_batches(life):
                    life.writer.publish([event])
            else:
                life.writer.publish([event])
            fault = rng.random()
            if fault < 0.02:
                life.client.flushall()
            elif fault < 0.04:
                life.client.delete(redis_key(CLUSTER, name, "events"))
            elif fault < 0.06:
                lives[name] = begin(name)
                lives[name].beat()
                truth[name] = set()
            elif fault < 0.2:
                life.beat()
            if rng.random() < 0.3:
                await asyncio.sleep(0.005)

        def quiet() -> bool:
            return all(index.keys_of(life.name) == truth[name] for name, life in lives.items())

        def beat() -> None:
            for life in lives.values():
                life.beat()

        await until(quiet, beat=beat)
        await stays(quiet, 0.2)
        assert mirror.position() == {life.name: (life.epoch, life.writer.acknowledged.seq) for life in lives.values()}
