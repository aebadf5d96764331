"""The counters of tenants' limits in Redis, shared by all routers: leases of places, and buckets that fill with time.

Knows digests, no tenant names, and Redis' clock only. Invariant: what routers hold in leases that have not expired is
never more than the limit, but for places in use when a limit was lowered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from kvstore.scope import TenantId


@dataclass(frozen=True, slots=True)
class Bucket:
    """`name` tells a tenant's buckets apart; `rate` units come in each second, up to `burst`."""

    name: str
    rate: float
    burst: float


class StoreAway(Exception):
    """Redis cannot be reached, or answers with an error."""


class LimitStore:
    """One router's hand in the shared counters. Every method raises `StoreAway` where Redis does not answer."""

    def __init__(self, client: redis.asyncio.Redis, cluster: str, secret: bytes, *, router: str, ttl_s: float) -> None:
        self._cluster = cluster
        self._key = hashlib.blake2b(secret, digest_size=32, person=b"pando.limits").digest()
        self._router = router
        self._ttl_ms = int(ttl_s * 1000)
        self._client = client
        self._lease = client.register_script(_LEASE)
        self._take = client.register_script(_TAKE)
        self._beat = client.register_script(_BEAT)

    async def beat(self) -> int:
        """Say that this router lives; how many do."""
        return int(await self._call(self._beat, [f"{self._cluster}:routers"], [self._router, self._ttl_ms]))

    async def lease(self, tenant: TenantId, limit: int, *, used: int, wanted: int, routers: int) -> int:
        """Places this router may fill from now on, those `used` among them; more than `wanted` if many are left."""
        keys = [self._name(tenant, "in-flight")]
        return int(await self._call(self._lease, keys, [self._router, limit, used, wanted, routers, self._ttl_ms]))

    async def take(self, tenant: TenantId, bucket: Bucket, need: float, most: float) -> tuple[float, float]:
        """(units taken, seconds to wait). All of `need`, and up to `most`, as long as anything is there: the rest is
        owed. Nothing while something is owed. A negative `need` gives units back."""
        keys = [self._name(tenant, bucket.name)]
        taken, wait = await self._call(self._take, keys, [bucket.rate, bucket.burst, need, most])
        return float(taken), float(wait)

    async def leave(self, tenants: list[TenantId]) -> None:
        """This router goes: its leases and its name are over."""
        pipe = self._client.pipeline(transaction=False)
        pipe.zrem(f"{self._cluster}:routers", self._router)
        for tenant in tenants:
            pipe.hdel(self._name(tenant, "in-flight"), self._router)
        await _reached(pipe.execute())

    async def _call(self, script: Any, keys: list[str], args: list[Any]) -> Any:
        return await _reached(script(keys=keys, args=args))

    def _name(self, tenant: TenantId, what: str) -> str:
        digest = hashlib.blake2b(tenant.encode(), key=self._key, digest_size=16).hexdigest()
        return f"{self._cluster}:limit:{digest}:{what}"


async def _reached(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except (RedisError, OSError) as error:
        raise StoreAway(type(error).__name__) from error


_NOW = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
"""

_BEAT = (
    _NOW
    + """
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""
)

# Who asks for a place gets a part of the free ones at once, the smaller the fewer are left: near the limit, one by one.
_LEASE = (
    _NOW
    + """
local limit, used, wanted = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local others = 0
local leases = redis.call('HGETALL', KEYS[1])
for i = 1, #leases, 2 do
  local places, ends = string.match(leases[i + 1], '^(%d+) (%d+)$')
  if not places or tonumber(ends) <= now then
    redis.call('HDEL', KEYS[1], leases[i])
  elseif leases[i] ~= ARGV[1] then
    others = others + tonumber(places)
  end
end
local spare = limit - others - used - wanted
local places = used
if wanted > 0 then
  if spare >= 0 then
    places = used + wanted + math.floor(spare / (2 * tonumber(ARGV[5])))
  else
    places = math.max(used, used + wanted + spare)
  end
end
if places > 0 then
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %d', places, now + tonumber(ARGV[6])))
  redis.call('PEXPIRE', KEYS[1], 2 * tonumber(ARGV[6]))
else
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return places
"""
)

_TAKE = (
    _NOW
    + """
local rate, burst, need, most = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local state = redis.call('HMGET', KEYS[1], 'units', 'at')
local units = burst
if state[1] then
  units = math.min(burst, tonumber(state[1]) + math.max(0, now - tonumber(state[2])) * rate / 1000)
end
local taken, wait = 0, 0
if need < 0 then
  units = math.min(burst, units - need)
elseif units > 0 then
  taken = math.max(need, math.min(most, units))
  units = units - taken
else
  wait = (rate / 1000 - units) / rate
end
redis.call('HSET', KEYS[1], 'units', string.format('%.6f', units), 'at', string.format('%d', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((burst + math.abs(units)) / rate * 1000) + 1000)
return {string.format('%.6f', taken), string.format('%.6f', wait)}
"""
)
