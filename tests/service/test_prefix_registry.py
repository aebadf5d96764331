"""The registry on a real Redis: routers that agree, races, losses, forgeries."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pando.errors import ResourceExhausted, Unavailable
from router.prefix_catalog import PrefixCatalog, PrefixRecord
from router.prefix_registry import PrefixRegistry
from router.prefix_seal import PrefixSeal

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

SECRET = b"secret"


def record(number: int, model: str = "m") -> PrefixRecord:
    tokens = array("I", [number, *range(20)]).tobytes()
    return PrefixRecord(
        id=f"{number:032x}",
        publisher="a",
        audience="own",
        group="",
        name=f"n{number}",
        model=model,
        tokens=tokens,
        copies=1,
        warm=False,
        created_ms=number,
    )


@asynccontextmanager
async def registry_on(url: str, secret: bytes = SECRET, **settings: Any) -> AsyncIterator[PrefixRegistry]:
    client = redis.asyncio.Redis.from_url(url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
    made = PrefixRegistry(
        client, "c", PrefixSeal(secret, "c"), PrefixCatalog(), **{"model": "m", "poll_s": 0.02} | settings
    )
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def known(registry: PrefixRegistry) -> list[int]:
    return sorted(int(published.record.id, 16) for published in registry.catalog)


async def until(fact: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not fact():
            await asyncio.sleep(0.005)


def nothing() -> None:
    """No objection."""


async def test_what_one_publishes_the_others_know_until_it_ends(redis_url: str) -> None:
    async with registry_on(redis_url) as one, registry_on(redis_url) as other:
        await one.put(record(1), 60, nothing)
        await other.put(record(2), 60, nothing)
        await one.put(record(3), 0.3, nothing)
        await until(lambda: known(one) == known(other) == [1, 2, 3])
        assert {p.record for p in one.catalog} == {p.record for p in other.catalog}
        await until(lambda: known(one) == known(other) == [1, 2], 1.0)
        await other.delete(record(1))
        await until(lambda: known(one) == [2])
        async with registry_on(redis_url) as late:
            assert known(late) == [2]
            [published] = late.catalog
            assert 50 < published.expires_at - late.catalog.clock() <= 60
        with redis.Redis.from_url(redis_url) as client:
            ids = client.smembers("c:{prefixes}:ids")
            assert ids == {record(2).id.encode()}  # the one that ended was taken out by who saw it


async def test_a_limit_holds_though_all_publish_at_once(redis_url: str) -> None:
    async with registry_on(redis_url) as one, registry_on(redis_url) as other:

        def check(registry: PrefixRegistry) -> None:
            if len(registry.catalog) >= 5:
                raise ResourceExhausted("full")

        puts = [
            registry.put(record(number), 60, lambda registry=registry: check(registry))
            for number, registry in enumerate([one, other] * 6, 1)
        ]
        results = await asyncio.gather(*puts, return_exceptions=True)
        assert sum(isinstance(result, ResourceExhausted) for result in results) == 7
        await until(lambda: known(one) == known(other) and len(known(one)) == 5)


async def test_records_of_others_are_passed_over(redis_url: str) -> None:
    async with (
        registry_on(redis_url) as mine,
        registry_on(redis_url, b"another secret") as strange,
        registry_on(redis_url, model="n") as elsewhere,
    ):
        await strange.put(record(1), 60, nothing)
        await elsewhere.put(record(2, model="n"), 60, nothing)
        await mine.put(record(3), 60, nothing)
        with redis.Redis.from_url(redis_url) as client:
            sealed = client.get(f"c:{{prefixes}}:{record(3).id}")
            client.set(f"c:{{prefixes}}:{record(4).id}", sealed, px=60_000)  # a record under another id
            client.set(f"c:{{prefixes}}:{record(5).id}", b"garbage", px=60_000)
            client.sadd("c:{prefixes}:ids", record(4).id, record(5).id, b"\xff\xfe")
        await mine.put(record(6), 60, nothing)
        await until(lambda: known(elsewhere) == [2] and known(strange) == [1])
        assert known(mine) == [3, 6]


async def test_a_redis_that_forgot_is_told_again_and_what_was_deleted_stays_so(own_redis: Any) -> None:
    async with registry_on(own_redis.url) as one, registry_on(own_redis.url, poll_s=0.4) as slow:
        for number in (1, 2, 3):
            await one.put(record(number), 60, nothing)
        await until(lambda: known(slow) == [1, 2, 3])
        await one.delete(record(2))
        own_redis.stop()  # before the slow one heard of it
        assert known(one) == [1, 3]
        with pytest.raises(Unavailable):
            await one.put(record(4), 60, nothing)
        with pytest.raises(Unavailable):
            await one.delete(record(1))
        assert known(one) == [1, 3]
        own_redis.start()
        await until(lambda: known(one) == known(slow) == [1, 3])
        async with registry_on(own_redis.url) as late:
            await until(lambda: known(late) == [1, 3])


async def test_a_router_that_starts_without_redis_finds_out_later(own_redis: Any) -> None:
    async with registry_on(own_redis.url) as one:
        await one.put(record(1), 60, nothing)
        own_redis.stop()
        async with registry_on(own_redis.url) as late:
            assert known(late) == []
            own_redis.start()
            await until(lambda: known(late) == [1] == known(one))
