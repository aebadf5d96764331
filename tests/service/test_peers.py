"""Routers tell each other through a real Redis what they sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.block import WorkerId
from router.peers import EVERY_S, PeerExchange, PeerLoads, SentLoad
from router.unheard import Others
from tests.conftest import RedisServer

pytestmark = pytest.mark.asyncio

W1 = WorkerId("w1")


class Router:
    """One router's part of the exchange."""

    def __init__(self, url: str, name: str) -> None:
        self.client = redis.asyncio.Redis.from_url(url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
        self.name = name
        self.sent: dict[str, SentLoad] = {}
        self.heard = PeerLoads()
        self.exchange = PeerExchange(
            self.client, "c", router=name, own=lambda: self.sent, loads=self.heard, clock=time.monotonic
        )

    async def start(self) -> None:
        await self.client.zadd("c:routers", {self.name: 2**52})
        await self.exchange.start()

    async def stop(self) -> None:
        await self.exchange.stop()
        await self.client.aclose()


async def until(holds: Callable[[], bool], seconds: float = 3.0) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it never came"
        await asyncio.sleep(0.01)


async def test_each_hears_the_sum_of_the_others(redis_url: str) -> None:
    routers = [Router(redis_url, f"r{n}") for n in range(3)]
    for number, router in enumerate(routers):
        router.sent = {"w1": SentLoad(5, 10 ** (number + 1), 1, line=((b"owner", 3, number + 1),))}
        await router.start()
    await until(lambda: [r.heard.at(W1, 5).queued_tokens for r in routers] == [1100, 1010, 110])
    assert [r.heard.at(W1, 5).line for r in routers] == [{b"owner": (3, number)} for number in (5, 4, 3)]
    routers[2].sent = {}
    await until(lambda: routers[0].heard.at(W1, 5).queued_tokens == 100)
    await routers[1].stop()
    await until(lambda: routers[0].heard.at(W1, 5).in_flight == 0)
    for router in (routers[0], routers[2]):
        await router.stop()


async def test_each_learns_what_the_others_send_at_the_moment_of_its_decisions(redis_url: str) -> None:
    routers = [Router(redis_url, f"r{n}") for n in range(3)]
    for number, router in enumerate(routers):
        router.sent = {"w1": SentLoad(5, 0, 0, fresh_tokens=10 ** (number + 1))}
        await router.start()
    await until(lambda: all(r.heard.news() for r in routers))
    await asyncio.sleep(3 * EVERY_S)
    for router in routers:
        router.heard.unheard.decide()
    await until(lambda: all(r.heard.unheard.others for r in routers))
    assert [r.heard.unheard.others for r in routers] == [Others(1100, 0, 3), Others(1010, 1, 3), Others(110, 2, 3)]
    for router in routers:
        await router.stop()


async def test_a_router_that_died_and_a_redis_that_is_away_are_forgotten(own_redis: RedisServer) -> None:
    one, other = Router(own_redis.url, "one"), Router(own_redis.url, "other")
    other.sent = {"w1": SentLoad(1, 10, 1)}
    await one.start()
    await other.start()
    await until(lambda: one.heard.at(W1, 1).queued_tokens == 10)
    own_redis.stop()
    await until(lambda: one.heard.at(W1, 1).queued_tokens == 0)
    own_redis.start()
    await one.client.zadd("c:routers", {"one": 2**52, "other": 2**52, "dead": 2**52})
    await one.client.set("c:router:dead:sent", b"\xc1 garbage", px=500)
    await until(lambda: one.heard.at(W1, 1).queued_tokens == 10)
    await one.stop()
    await other.stop()
