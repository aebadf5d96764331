"""Redis killed, hung and flushed under load: no request fails, routers stay in the picture over the workers' links."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import redis

from kvstore.block import WorkerId
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from router.dispatch import Dispatch
from router.fleet import Fleet
from router.scopes import Scopes
from router.self_check import SelfCheck
from router.worker_link import WorkerLink
from tests.service.test_routing import BLOCK, CLUSTER, Router, full_blocks, prompt, two_workers

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(110)]

LENGTH = 256
ENOUGH_BLOCKS = 20_000  # nothing is evicted: what was answered is there
AWAY_S = 2.5
"""Longer than a lease lives."""

KNOWN_AFTER_S = 1.0
"""A prompt answered so long ago must be known to every router."""


@asynccontextmanager
async def routers_on(redis_url: str, names: tuple[str, ...]) -> AsyncIterator[list[Router]]:
    async with AsyncExitStack() as stack:
        routers = []
        for name in names:
            index = MemoryIndex()
            mirror = Mirror(redis_url, CLUSTER, index)
            link = partial(WorkerLink, following=mirror.following)
            fleet = Fleet(mirror, index, router=name, model="sim", block_size=BLOCK, link_type=link)
            await fleet.start()
            stack.push_async_callback(fleet.stop)
            await mirror.start()
            stack.push_async_callback(mirror.stop)
            routers.append(Router(mirror, index, fleet, Dispatch(fleet, Scopes(b"secret"))))
        for router in routers:
            await router.until(lambda router=router: router.num_ready() == 2)  # type: ignore[misc]
        yield routers


@dataclass
class Load:
    """Requests through random routers, for prompts that were asked before and for new ones."""

    routers: list[Router]
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    answered: dict[int, float] = field(default_factory=dict)  # when each prompt's first answer was complete
    failures: list[BaseException] = field(default_factory=list)
    asked: int = 0
    blind: int = 0
    hits: list[bool] = field(default_factory=list)
    running: bool = True

    async def run(self) -> None:
        while self.running:
            new = self.rng.random() < 0.1
            known = [seed for seed, when in self.answered.items() if time.monotonic() - when > KNOWN_AFTER_S]
            seed = len(self.answered) + 1000 * new if new or not known else self.rng.choice(known)
            await self.ask(seed, seed in known)
            await asyncio.sleep(0.005)

    async def ask(self, seed: int, known: bool) -> None:
        router = self.rng.choice(self.routers)
        try:
            deltas = await router.ask("a", tokens(seed))
        except Exception as error:  # noqa: BLE001  whatever it is, the request failed
            self.failures.append(error)
            return
        self.asked += 1
        self.answered.setdefault(seed, time.monotonic())
        if known:
            predicted = deltas[0].predicted_cached
            self.hits.append(predicted >= full_blocks(LENGTH))
            self.blind += predicted == 0

    def hit_rate(self, last: int) -> float:
        recent = self.hits[-last:]
        return sum(recent) / max(1, len(recent))


def tokens(seed: int) -> array[int]:
    return prompt(10_000 + seed, LENGTH)


def end(server: Any, how: str) -> None:
    if how == "kill":
        server.stop()
    elif how == "hang":
        os.kill(server.process.pid, signal.SIGSTOP)
    else:
        with redis.Redis.from_url(server.url) as client:
            client.flushall()


def bring_back(server: Any, how: str) -> None:
    if how == "kill":
        server.start()
    elif how == "hang":
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("how", ["kill", "hang", "flush"])
async def test_no_request_fails_and_hits_go_on(own_redis: Any, how: str) -> None:
    with two_workers(own_redis.url, device_blocks=ENOUGH_BLOCKS):
        async with routers_on(own_redis.url, ("r1", "r2")) as routers:
            load = Load(routers)
            tasks = [asyncio.create_task(load.run()) for _ in range(4)]
            await asyncio.sleep(3.0)
            before = load.hit_rate(200)
            assert before > 0.9
            end(own_redis, how)
            try:
                await asyncio.sleep(AWAY_S)
                if how != "flush":
                    assert not any(router.mirror.connected for router in routers)
                    assert all(router.mirror.counts.fed for router in routers)
            finally:
                bring_back(own_redis, how)
            load.hits.clear()
            back = time.monotonic()
            await routers[0].until(
                lambda: (
                    all(router.mirror.connected and len(router.mirror.position()) == 2 for router in routers)
                    and len(load.hits) >= 50
                    and load.hit_rate(50) >= 0.9 * before
                )
            )
            assert time.monotonic() - back < 10
            await asyncio.sleep(1.0)
            load.running = False
            await asyncio.gather(*tasks)
            assert load.failures == []
            assert load.blind <= 0.005 * load.asked, (load.blind, load.asked)
            await routers[0].until(lambda: in_step(routers))


def in_step(routers: list[Router]) -> bool:
    """Whether all routers hold the same, and what Redis would give a new one."""
    digests = [{name: router.index.digest(WorkerId(name)) for name in ("w0", "w1")} for router in routers]
    leases = routers[0].mirror.leases()
    return all(found == {name: lease.digest for name, lease in leases.items()} for found in digests)


async def test_what_happens_while_redis_is_away_reaches_routers_over_the_links(own_redis: Any) -> None:
    with two_workers(own_redis.url):
        async with routers_on(own_redis.url, ("r1", "r2")) as (one, two):
            await one.ask("a", tokens(1))
            own_redis.stop()
            await one.until(lambda: not one.mirror.connected and not two.mirror.connected)
            home = (await one.ask("a", tokens(2)))[0].worker
            await two.until(lambda: two.mirror.counts.fed > 0)
            answer = (await two.ask("a", tokens(2)))[0]
            assert (answer.worker, answer.predicted_cached) == (home, full_blocks(LENGTH))
            own_redis.start()
            await two.until(lambda: in_step([one, two]) and two.mirror.connected)


async def test_a_worker_that_cannot_reach_redis_stays_while_its_link_lives(own_redis: Any) -> None:
    """Its lease ends, as when the way from worker to Redis alone is cut."""
    with two_workers(own_redis.url, lease_ttl_s=0.6, heartbeat_s=0.5):
        async with routers_on(own_redis.url, ("r1",)) as (router,):
            home = (await router.ask("a", tokens(1)))[0].worker
            with redis.Redis.from_url(own_redis.url) as client:
                for _ in range(100):
                    client.delete(f"{CLUSTER}:{{w0}}:lease", f"{CLUSTER}:{{w1}}:lease")
                    await asyncio.sleep(0.01)
                assert router.num_ready() == 2
                assert (await router.ask("a", tokens(1)))[0].worker == home


async def test_an_old_dump_costs_hints_and_nothing_else(own_redis: Any) -> None:
    with two_workers(own_redis.url):
        async with routers_on(own_redis.url, ("r1", "r2")) as routers:
            for seed in range(5):
                await routers[0].ask("a", tokens(seed))
            with redis.Redis.from_url(own_redis.url) as client:
                dump = {key: client.dump(key) for key in client.keys("*")}
                for seed in range(5, 40):
                    await routers[seed % 2].ask("a", tokens(seed))
                client.flushall()
                for key, value in dump.items():
                    client.restore(key, 0, value, replace=True)
            for seed in range(40):
                answer = (await routers[seed % 2].ask("a", tokens(seed)))[0]
                assert answer.predicted_cached >= full_blocks(LENGTH)
            await routers[0].until(lambda: in_step(routers))


async def test_a_router_that_knows_nothing_gets_all_of_it_over_the_link(own_redis: Any) -> None:
    with two_workers(own_redis.url):
        async with routers_on(own_redis.url, ("r1",)) as (router,):
            home = WorkerId((await router.ask("a", tokens(1)))[0].worker)
            await router.until(lambda: router.index.num_blocks(home) >= LENGTH // BLOCK)
            held = router.index.keys_of(home)
            own_redis.stop()
            await router.until(lambda: not router.mirror.connected)
            router.index.remove_worker(home)
            router.mirror.following.workers[home].seq = None
            await router.until(lambda: router.index.keys_of(home) == held)
            assert router.mirror.position()[home][1] > 0


async def test_a_set_that_is_damaged_in_redis_is_found_by_its_digest_and_written_anew(own_redis: Any) -> None:
    with two_workers(own_redis.url):
        async with routers_on(own_redis.url, ("r1",)) as (router,):
            for seed in range(8):
                await router.ask("a", tokens(seed))
            await router.until(lambda: in_step([router]))
            with redis.Redis.from_url(own_redis.url) as client:
                client.delete(*client.keys(f"{CLUSTER}:{{w0}}:set:*"))
            async with routers_on(own_redis.url, ("r2",)) as (late,):
                await late.until(lambda: late.mirror.counts.mismatches > 0 and in_step([late]))
            assert in_step([router])


@pytest.mark.parametrize(("block_size", "unfound"), [(BLOCK, 0), (2 * BLOCK, 2)])
async def test_the_planted_prefix_is_found_through_the_whole_path(
    own_redis: Any, block_size: int, unfound: int
) -> None:
    with two_workers(own_redis.url):
        index = MemoryIndex()
        mirror = Mirror(own_redis.url, CLUSTER, index)
        check = SelfCheck(index, block_size)
        mirror.following.on_read = check
        await mirror.start()
        try:
            async with asyncio.timeout(10):
                while len(mirror.position()) < 2:
                    await asyncio.sleep(0.02)
            assert check.num_unfound == unfound
        finally:
            await mirror.stop()
