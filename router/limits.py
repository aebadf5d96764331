"""What a tenant may use of the whole fleet, whichever routers it comes through: places in flight, requests, tokens.

Holds small leases of the shared counters, so most requests ask nobody. Knows no queue and no worker. Invariant: a place
is given back once; while Redis is away each router grants its even part, one place at least, so a limit is neither lost
nor multiplied, but where it is smaller than the number of routers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kvstore.scope import TenantId
from router.limit_store import Bucket, LimitStore, StoreAway
from router.tenants import Tenant

log = logging.getLogger(__name__)

BEAT_S = 0.25
LEASE_TTL_S = 2.0
TIMEOUT_S = 0.05
"""Of the store's client: longer than this no request waits for Redis."""
RETRY_S = 0.5
BURST_S = 1.0
"""Seconds of a rate that may come at once."""
STOCK_S = 0.1
"""Seconds of a rate that one router takes in advance, divided by the number of routers."""
BUSY_RETRY_S = 0.5

T = TypeVar("T")


@dataclass(slots=True)
class _Places:
    """A tenant's places in flight at this router; whoever changes `granted` has the lock."""

    tenant: Tenant
    granted: int = 0
    used: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def full(self) -> bool:
        return self.used >= min(self.granted, self.tenant.max_in_flight)


@dataclass(slots=True)
class _Stock:
    """Units of a bucket taken in advance. Without Redis it fills by itself: at first to the brim."""

    tenant: TenantId
    bucket: Bucket
    units: float = 0.0
    filled_at: float = -math.inf


class FleetLimits:
    """For one event loop. Without a store, one router is the whole fleet.

    Scarcity is answered in seconds to wait before another try; 0.0 is yes.
    """

    def __init__(self, store: LimitStore | None, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._routers = 1
        self._away_until = 0.0
        self._places: dict[TenantId, _Places] = {}
        self._stocks: dict[tuple[TenantId, str], _Stock] = {}
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Join the routers, and keep the leases from now on."""
        if self._store is not None:
            await self._beat()
            self._task = asyncio.create_task(self._keep(), name="tenant-limits")

    async def stop(self) -> None:
        """Leave, and give all back. Idempotent."""
        task, self._task = self._task, None
        if task is None or self._store is None:
            return
        self._stopping.set()  # a cancellation may be swallowed below redis-py
        await task
        await self._ask(self._store.leave(list(self._places)), None)

    async def enter(self, tenant: Tenant) -> tuple[float, float]:
        """Count one more request in flight, and one against its rate: seconds to wait for a place, and for the rate.

        `leave` gives the place back, of a request that was let in.
        """
        if tenant.max_in_flight and not await self._take_place(tenant):
            return BUSY_RETRY_S, 0.0
        late = await self._pay(tenant, "requests", tenant.requests_per_s, 1.0)
        if late:
            self.leave(tenant)
        return 0.0, late

    def leave(self, tenant: Tenant) -> None:
        """A request that entered has ended."""
        places = self._places.get(tenant.id)
        if places is not None and places.used:
            places.used -= 1

    async def spend(self, tenant: Tenant, prompt_tokens: int) -> float:
        """Pay for a prompt. One over the burst is let through and waited for by those after it."""
        return await self._pay(tenant, "prompt-tokens", tenant.prompt_tokens_per_s, float(prompt_tokens))

    # Places

    async def _take_place(self, tenant: Tenant) -> bool:
        places = self._places.get(tenant.id)
        if places is None:
            places = self._places[tenant.id] = _Places(tenant)
        places.tenant = tenant
        if places.full:
            async with places.lock:
                if places.full:
                    places.granted = await self._lease(places, 1)
                if places.full:
                    return False
        places.used += 1
        return True

    async def _lease(self, places: _Places, wanted: int) -> int:
        limit = places.tenant.max_in_flight
        if self._store is None:
            return limit
        lease = self._store.lease(places.tenant.id, limit, used=places.used, wanted=wanted, routers=self._routers)
        return await self._ask(lease, max(1, limit // self._routers))

    # Rates

    async def _pay(self, tenant: Tenant, name: str, rate: float, need: float) -> float:
        if not rate:
            return 0.0
        bucket = Bucket(name, rate, max(rate * BURST_S, 1.0))
        key = (tenant.id, name)
        stock = self._stocks.get(key)
        if stock is None or stock.bucket != bucket:
            stock = self._stocks[key] = _Stock(tenant.id, bucket)
        if stock.units < need:
            wait = await self._fill(stock, need - stock.units)
            if wait:
                return wait
        stock.units -= need
        return 0.0

    async def _fill(self, stock: _Stock, need: float) -> float:
        if self._store is None:
            return self._fill_alone(stock)
        most = max(need, stock.bucket.rate * STOCK_S / self._routers)
        nothing = (-1.0, 0.0)
        taken, wait = await self._ask(self._store.take(stock.tenant, stock.bucket, need, most), nothing)
        if taken < 0:
            return self._fill_alone(stock)
        stock.units += taken
        return wait

    def _fill_alone(self, stock: _Stock) -> float:
        """As the shared bucket, with this router's part of the rate: anything there is enough, the rest is owed."""
        now, rate = self._clock(), stock.bucket.rate / self._routers
        burst = max(stock.bucket.burst / self._routers, 1.0)
        stock.units = min(burst, stock.units + (now - stock.filled_at) * rate)
        stock.filled_at = now
        return 0.0 if stock.units > 0 else max((1e-3 - stock.units) / rate, 1e-3)

    # Redis

    async def _ask(self, call: Awaitable[T], otherwise: T) -> T:
        """The answer of Redis, or `otherwise` where it is away: then nobody asks for a while."""
        if self._clock() < self._away_until:
            if asyncio.iscoroutine(call):
                call.close()
            return otherwise
        try:
            return await call
        except StoreAway:
            if not self._away_until:
                log.warning("the shared limits are out of reach: each of %d routers grants its part", self._routers)
            self._away_until = self._clock() + RETRY_S
            return otherwise

    async def _keep(self) -> None:
        while not await self._stopped_within(BEAT_S):
            await self._beat()
            for places in list(self._places.values()):
                await self._renew(places)
            if not self._away_until:
                await self._return_stocks()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._stopping.wait()
        except TimeoutError:
            return False

    async def _renew(self, places: _Places) -> None:
        """Keep what is in use, give back what is not."""
        if not places.granted and not places.used:
            return
        async with places.lock:
            places.granted = places.used  # who comes meanwhile asks behind us
            places.granted = await self._lease(places, 0)

    async def _beat(self) -> None:
        assert self._store is not None
        was_away = self._away_until
        routers = await self._ask(self._store.beat(), 0)
        if routers:
            self._routers = routers
            if was_away:
                log.info("the shared limits are back")
            self._away_until = 0.0

    async def _return_stocks(self) -> None:
        """What was taken in advance and not used goes back."""
        assert self._store is not None
        for key, stock in list(self._stocks.items()):
            del self._stocks[key]
            if stock.units > 0:
                await self._ask(self._store.take(stock.tenant, stock.bucket, -stock.units, 0.0), (0.0, 0.0))
