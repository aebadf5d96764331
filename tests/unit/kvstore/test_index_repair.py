"""Whatever happens to events, links, workers and Redis: once it is over, every mirror equals its workers.

The code that decides is the real one, of both ends; `memory_redis` stands in for the network.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.block import WorkerId
from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared, Event, TierChanged
from kvstore.following import FeedRequest
from kvstore.lease import Fenced, Lease, LeaseKeeper, take_epoch
from kvstore.ledger import Ledger, Told
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror, MirrorTimes
from kvstore.redis_index import RedisIndexWriter
from tests.unit.kvstore.memory_redis import MemoryRedis, RouterClient, WorkerClient

KEYS = [hashlib.blake2b(bytes([number]), digest_size=16).digest() for number in range(40)]
NAMES = ("w0", "w1", "w2")
TIMES = MirrorTimes(poll=0.25, block=0.0, timeout=0.05, grace=2.0, reload=0.5)
BEAT_S = 0.5
ROUNDS_TO_REPAIR = 40
QUIET_ROUNDS = 4

ACTS = (
    "store", "store", "store", "remove", "tier", "clear", "beat", "beat", "turn", "turn", "turn", "restart",
    "link up", "link down", "hear", "hear", "hear badly", "away", "back", "mute", "flush", "dump", "restore",
    "expire", "lose entry", "say in vain", "lose bucket", "shuffle", "tick",
)  # fmt: skip


class Worker:
    """One life, as its publisher runs it, and its end of a link."""

    def __init__(self, world: World, name: str) -> None:
        client = WorkerClient(world.redis)
        epoch = take_epoch(client, "memory", name)  # type: ignore[arg-type]
        self.ledger = Ledger(name, epoch, kept_keys=30, kept_batches=8)
        self.writer = RedisIndexWriter(client, "memory", self.ledger, capacity=300)  # type: ignore[arg-type]
        self.keeper = LeaseKeeper(client, "memory")  # type: ignore[arg-type]
        self.told: list[Told] = []
        self.fenced = False
        self._hear = self.told.append

    def beat(self) -> None:
        at = self.writer.acknowledged
        lease = Lease(
            worker_id=self.ledger.worker_id, epoch=self.ledger.epoch, address="", model="", block_size=16,
            key_fingerprint="", model_fingerprint="", pid=1, device_blocks=9, max_model_len=9, vocab_size=9,
            seq=at.seq, num_blocks=at.num_blocks, digest=at.digest,
        )  # fmt: skip
        try:
            self.keeper.renew(lease)
            self.writer.repair()
        except redis.RedisError:
            pass
        except Fenced:
            self.fenced = True

    def publish(self, event: Event) -> None:
        try:
            self.writer.publish([event])
        except Fenced:
            self.fenced = True

    def ask(self, request: FeedRequest) -> None:
        if request.kind == "follow":
            self.ledger.follow(self._hear, request.seq)
        elif request.kind == "unfollow":
            self.ledger.unfollow(self._hear)
        else:
            self.writer.publish_snapshot()

    def held(self, tier: int) -> set[bytes]:
        return set(self.ledger.keys(tier))


class World:
    """Three workers, one router, one Redis, and what may happen to them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.redis = MemoryRedis(self.rng)
        self.index = MemoryIndex()
        router = RouterClient(self.redis)
        self.mirror = Mirror(router, "memory", self.index, times=TIMES, clock=lambda: self.now)  # type: ignore[arg-type]
        self.following = self.mirror.following
        self.workers = {name: Worker(self, name) for name in NAMES}
        self.linked: set[str] = set()
        self.saved = self.redis.dump()

    async def act(self, act: str, name: str) -> None:
        worker = self.workers[name]
        some = self.rng.sample(KEYS, self.rng.randrange(1, 6))
        tier = self.rng.choice((DEVICE, DEVICE, CPU))
        events: dict[str, Event] = {
            "store": BlocksStored(some, tier), "remove": BlocksRemoved(some, tier),
            "tier": TierChanged(some, tier), "clear": Cleared(),
        }  # fmt: skip
        if act in events:
            worker.publish(events[act])
        elif act == "say in vain":
            worker.publish(events["store"])
            self.redis.lose_entry(name, newest=True)
        elif act == "turn":
            await self.turn()
        else:
            self._acts(worker)[act]()

    def _acts(self, worker: Worker) -> dict[str, Callable[[], object]]:
        name = worker.ledger.worker_id
        return {
            "beat": worker.beat,
            "restart": lambda: self.restart(name),
            "link up": lambda: self.link_up(name),
            "link down": lambda: self.link_down(name),
            "hear": lambda: self.hear(worker),
            "hear badly": lambda: self.hear(worker, badly=True),
            "away": lambda: setattr(self.redis, "away", True),
            "back": lambda: setattr(self.redis, "away", False),
            "mute": lambda: setattr(self.redis, "mute", 2),
            "flush": self.redis.flush,
            "dump": lambda: setattr(self, "saved", self.redis.dump()),
            "restore": lambda: self.redis.restore(self.saved),
            "expire": self.redis.expire_leases,
            "lose entry": lambda: self.redis.lose_entry(name),
            "lose bucket": lambda: self.redis.lose_bucket(name),
            "shuffle": lambda: setattr(self.redis, "shuffled", 2),
            "tick": lambda: setattr(self, "now", self.now + self.rng.choice((0.1, 0.5, 3.0))),
        }

    async def turn(self) -> None:
        self.now += 0.1
        try:
            await self.mirror.turn()
        except redis.RedisError as error:
            self.mirror.lost(str(error))

    def restart(self, name: str) -> None:
        if self.redis.away or self.redis.mute:
            return
        self.link_down(name)
        self.workers[name] = Worker(self, name)
        self.workers[name].beat()

    def link_up(self, name: str) -> None:
        self.link_down(name)
        worker = self.workers[name]
        self.linked.add(name)
        self.following.link_up(WorkerId(name), worker.ledger.epoch, worker.ask)

    def link_down(self, name: str) -> None:
        worker = self.workers[name]
        self.linked.discard(name)
        self.following.link_down(WorkerId(name), worker.ask)
        worker.ask(FeedRequest("unfollow"))
        worker.told.clear()

    def hear(self, worker: Worker, *, badly: bool = False) -> None:
        """What a worker said over its link reaches the router."""
        name = worker.ledger.worker_id
        told = worker.told[:]
        worker.told.clear()
        if badly and told:
            told += [self.rng.choice(told)]
            self.rng.shuffle(told)
            del told[self.rng.randrange(len(told))]
        for item in told:
            if isinstance(item, list):
                self.following.take_feed(WorkerId(name), worker.ledger.epoch, item)
            else:
                self.following.take_snapshot(WorkerId(name), worker.ledger.epoch, item)

    async def settle(self) -> None:
        """All faults end; heartbeats, links and the mirror go on until nothing differs, for a bounded time."""
        self.redis.away, self.redis.mute, self.redis.shuffled = False, 0, 0
        quiet = 0
        for _ in range(ROUNDS_TO_REPAIR):
            self.now += BEAT_S
            for name in NAMES:
                if self.workers[name].fenced:
                    self.restart(name)
                self.workers[name].beat()
                followed = self.following.workers.get(WorkerId(name))
                if followed is not None and (followed.ask is None or followed.ask != self.workers[name].ask):
                    self.link_up(name)
                self.hear(self.workers[name])
            await self.turn()
            quiet = 0 if self.differing() else quiet + 1
            if quiet == QUIET_ROUNDS:
                return

    def differing(self) -> list[str]:
        return [
            name
            for name, worker in self.workers.items()
            if any(self.index.keys_of(WorkerId(name), tier) != worker.held(tier) for tier in (DEVICE, CPU))
            or self.index.digest(WorkerId(name)) != worker.ledger.position.digest
        ]


def check(seed: int, acts: list[tuple[str, str]]) -> None:
    async def run() -> None:
        world = World(seed)
        for worker in world.workers.values():
            worker.beat()
        for act, name in acts:
            await world.act(act, name)
        await world.settle()
        assert world.differing() == []
        for name in NAMES:  # and it stays so, by events alone
            world.workers[name].publish(BlocksStored(KEYS[:3]))
        loads = world.mirror.counts.loads
        await world.turn()
        assert world.differing() == [] and world.mirror.counts.loads == loads

    asyncio.run(run())


SCHEDULES = st.lists(st.tuples(st.sampled_from(ACTS), st.sampled_from(NAMES)), max_size=80)
ODD = [HealthCheck.too_slow]


@given(st.integers(0, 2**32), SCHEDULES)
@settings(max_examples=250, deadline=None, suppress_health_check=ODD)
def test_mirror_equals_workers_after_repair(seed: int, acts: list[tuple[str, str]]) -> None:
    check(seed, acts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(st.integers(0, 2**32), SCHEDULES)
@settings(max_examples=10_000, deadline=None, suppress_health_check=ODD)
def test_mirror_equals_workers_after_repair_long(seed: int, acts: list[tuple[str, str]]) -> None:
    check(seed, acts)


def test_a_link_that_is_up_before_redis_was_read_is_asked_for_nothing_until_redis_is_away() -> None:
    async def run() -> None:
        world = World(0)
        world.following.on_lease_change = lambda worker, lease: world.link_up(worker)
        for worker in world.workers.values():
            worker.publish(BlocksStored(KEYS[:3]))
            worker.beat()
        for _ in range(3):
            await world.turn()
        assert world.differing() == [] and world.linked == set(NAMES)
        assert [worker.told for worker in world.workers.values()] == [[], [], []]
        world.redis.away = True
        await world.turn()
        for worker in world.workers.values():
            worker.publish(BlocksStored(KEYS[3:5]))
            world.hear(worker)
        assert world.differing() == [] and world.mirror.counts.fed > 0

    asyncio.run(run())
