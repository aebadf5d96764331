"""Limits of a tenant over several routers and a real Redis: never more than the limit, and no less for long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.scope import TenantId
from router.limit_store import LimitStore
from router.limits import BEAT_S, LEASE_TTL_S, FleetLimits
from router.tenants import Tenant
from tests.conftest import RedisServer

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def routers(url: str, count: int) -> AsyncIterator[list[FleetLimits]]:
    async with AsyncExitStack() as stack:
        found = []
        for number in range(count):
            client = redis.asyncio.Redis.from_url(url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0))
            stack.push_async_callback(client.aclose)
            store = LimitStore(client, "c", b"secret", router=f"r{number}", ttl_s=LEASE_TTL_S)
            limits = FleetLimits(store, clock=time.monotonic)
            await limits.start()
            stack.push_async_callback(limits.stop)
            found.append(limits)
        await asyncio.sleep(2 * BEAT_S)  # each knows how many there are
        yield found


async def entered(limits: FleetLimits, tenant: Tenant) -> bool:
    return await limits.enter(tenant) == (0.0, 0.0)


@pytest.mark.parametrize("limit", [1, 5, 64])
async def test_places_are_those_of_all_routers_together(redis_url: str, limit: int) -> None:
    tenant = Tenant(TenantId("a"), limit)
    async with routers(redis_url, 4) as fleet:
        tries = [entered(fleet[n % 4], tenant) for n in range(2 * limit + 8)]
        inside = sum(await asyncio.gather(*tries))
        assert 1 <= inside <= limit
        await asyncio.sleep(2 * BEAT_S)  # what others took in advance is back
        while await entered(fleet[0], tenant):
            inside += 1
        assert inside == limit
        assert await entered(fleet[1], Tenant(TenantId("b"), limit))


async def test_places_given_back_can_be_taken_elsewhere(redis_url: str) -> None:
    tenant = Tenant(TenantId("a"), 6)
    async with routers(redis_url, 2) as (one, other):
        assert [await entered(one, tenant) for _ in range(6)] == [True] * 6
        assert not await entered(other, tenant)
        for _ in range(6):
            one.leave(tenant)
        await asyncio.sleep(2 * BEAT_S)
        assert [await entered(other, tenant) for _ in range(7)] == [True] * 6 + [False]


async def test_a_dead_routers_places_come_back(redis_url: str) -> None:
    tenant = Tenant(TenantId("a"), 2)
    client = redis.asyncio.Redis.from_url(redis_url)
    store = LimitStore(client, "c", b"secret", router="dead", ttl_s=0.5)
    assert await store.lease(tenant.id, 2, used=0, wanted=2, routers=1) == 2
    async with routers(redis_url, 1) as (alive,):
        await asyncio.sleep(0.6)
        assert [await entered(alive, tenant) for _ in range(3)] == [True, True, False]
    await client.aclose()


async def test_a_rate_is_that_of_all_routers_together(redis_url: str) -> None:
    tenant = Tenant(TenantId("a"), requests_per_s=40.0)
    async with routers(redis_url, 4) as fleet:
        began, let_in = time.monotonic(), 0
        while time.monotonic() - began < 2.0:
            let_in += sum([await entered(limits, tenant) for limits in fleet])
            await asyncio.sleep(0.005)
        seconds = time.monotonic() - began
    assert 40 * seconds <= let_in <= 40 * (seconds + 1) + 4  # and one second's burst


async def test_a_prompt_over_the_burst_is_paid_by_those_after_it(redis_url: str) -> None:
    tenant = Tenant(TenantId("a"), prompt_tokens_per_s=1000.0)
    async with routers(redis_url, 2) as (one, other):
        assert await one.spend(tenant, 3000) == 0.0
        wait = await other.spend(tenant, 1)
        assert 1.0 < wait <= 2.1
        assert await other.spend(Tenant(TenantId("b"), prompt_tokens_per_s=10.0), 5) == 0.0


@pytest.mark.timeout(60)
async def test_without_redis_each_router_grants_its_part(own_redis: RedisServer) -> None:
    tenant = Tenant(TenantId("a"), 8, requests_per_s=100.0)
    async with routers(own_redis.url, 2) as (one, other):
        assert await entered(one, tenant)
        own_redis.stop()
        began = time.monotonic()
        inside = [await entered(limits, tenant) for limits in (one, other) for _ in range(8)]
        assert time.monotonic() - began < 1.0
        assert sum(inside) + 1 == 8
        own_redis.start()
        await asyncio.sleep(1.5)
        assert not await entered(one, tenant)
        one.leave(tenant)
        await asyncio.sleep(2 * BEAT_S)
        assert await entered(other, tenant)


async def test_redis_holds_no_name_and_a_router_that_leaves_leaves_nothing(redis_url: str) -> None:
    client = redis.asyncio.Redis.from_url(redis_url, decode_responses=True)
    tenant = Tenant(TenantId("acme"), 8, requests_per_s=10.0)
    async with routers(redis_url, 1) as (limits,):
        assert await entered(limits, tenant)
        keys = await client.keys()
        assert len(keys) == 3
        assert not any("acme" in key or "a" * 8 in key for key in keys)
    assert not [key for key in await client.keys() if key.endswith("in-flight")]
    assert not await client.zcard("c:routers")
    await client.aclose()
