"""The published prefixes of a fleet, kept in Redis for all routers and followed into each one's catalog.

Knows Redis and sealed records only. Invariant: a change is written only onto the state it was decided on; while Redis
is away what is known stays in use until it ends, and a Redis that lost its memory gets back what routers know.

    {cluster}:{prefixes}:version    <life>.<random>; another value after each change, another life after a loss
    {cluster}:{prefixes}:ids        set of ids; those whose record has ended are taken out by who sees it
    {cluster}:{prefixes}:<id>       sealed record, with the time to live of the prefix
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from kvstore.task_end import end
from pando.errors import ResourceExhausted, Unavailable
from router.prefix_catalog import PrefixCatalog, PrefixRecord, Published
from router.prefix_seal import PrefixSeal

POLL_S = 0.25
MAX_PREFIXES = 4096
RETRY_AFTER_S = 1.0

_ATTEMPTS = 16
_READ_AT_ONCE = 32

# KEYS: version, ids, record. ARGV: version it was decided on, new version, id, time to live in ms, sealed or "".
_CHANGE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
if ARGV[5] == '' then
  redis.call('DEL', KEYS[3])
  redis.call('SREM', KEYS[2], ARGV[3])
else
  redis.call('SET', KEYS[3], ARGV[5], 'PX', ARGV[4])
  redis.call('SADD', KEYS[2], ARGV[3])
end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""

log = logging.getLogger(__name__)


class PrefixRegistry:
    """Keeps `catalog` equal to what Redis holds for `model`, and changes both. For one event loop."""

    def __init__(
        self,
        client: redis.asyncio.Redis,
        cluster: str,
        seal: PrefixSeal,
        catalog: PrefixCatalog,
        *,
        model: str,
        poll_s: float = POLL_S,
    ) -> None:
        self.catalog = catalog
        self._client = client
        self._base = f"{cluster}:{{prefixes}}:"
        self._seal = seal
        self._model = model
        self._poll_s = poll_s
        self._change = client.register_script(_CHANGE)
        self._version: bytes | None = None  # None until Redis was read
        self._foreign: set[str] = set()  # ids whose records are of another model, or cannot be opened
        self._deleted: dict[str, float] = {}  # ids deleted here, until when they could come back
        self._following = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is there and follow it from now on; a Redis that is away is tried again."""
        await self._follow()
        self._task = asyncio.create_task(self._poll(), name="prefix-registry")

    async def stop(self) -> None:
        """Follow no more and close the connection. Idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None
        await self._client.aclose()

    async def put(self, record: PrefixRecord, ttl_s: float, check: Callable[[], None]) -> Published:
        """Publish. `check` raises if the prefixes that the catalog then has leave no room for it."""

        def decide() -> None:
            if len(self.catalog) >= MAX_PREFIXES:
                raise ResourceExhausted("the fleet has as many published prefixes as it can", reason="PREFIXES")
            check()

        await self._write_surely(record.id, self._seal.seal(record), ttl_s, decide)
        published = Published(record, self.catalog.clock() + ttl_s)
        self.catalog.add(published)
        return published

    async def delete(self, record: PrefixRecord) -> None:
        """End a prefix for every router."""
        published = next((found for found in self.catalog if found.record.id == record.id), None)
        await self._write_surely(record.id, b"", 0, lambda: None)
        if published is not None:
            self._deleted[record.id] = published.expires_at
        self.catalog.remove(record.id)

    # Following

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            await self._follow()

    async def _follow(self) -> None:
        self.catalog.expire()
        now = self.catalog.clock()
        self._deleted = {prefix_id: until for prefix_id, until in self._deleted.items() if until > now}
        try:
            async with self._following:
                await self._read()
        except RedisError:
            log.debug("published prefixes: Redis is away")

    async def _read(self) -> None:
        """Bring the catalog to what Redis holds; give back to it what it has lost. Under the lock."""
        version = await self._newest()
        if version == self._version:
            return
        ids = {raw.decode(errors="replace") for raw in await _answer(self._client.smembers(self._key("ids")))}
        self._foreign &= ids
        await self._load(sorted(ids - self._foreign - {found.record.id for found in self.catalog}))
        missing = [found for found in self.catalog if found.record.id not in ids]
        if missing and self._version is not None and _life(version) != _life(self._version):
            await self._give_back(missing, version)
            return
        for published in missing:
            self.catalog.remove(published.record.id)
        self._version = version
        for prefix_id in ids & self._deleted.keys():  # given back by a router that had not heard of it
            await self._write(prefix_id, b"", 0)

    async def _load(self, ids: Sequence[str]) -> None:
        for first in range(0, len(ids), _READ_AT_ONCE):
            part = ids[first : first + _READ_AT_ONCE]
            async with self._client.pipeline(transaction=False) as pipe:
                for prefix_id in part:
                    pipe.get(self._key(prefix_id))
                    pipe.pttl(self._key(prefix_id))
                found = await pipe.execute()
            now = self.catalog.clock()
            for prefix_id, sealed, ttl_ms in zip(part, found[::2], found[1::2], strict=True):
                await self._take(prefix_id, sealed, now + ttl_ms / 1000)

    async def _take(self, prefix_id: str, sealed: bytes | None, expires_at: float) -> None:
        if sealed is None:
            await _answer(self._client.srem(self._key("ids"), prefix_id))
            return
        record = self._seal.open(prefix_id, sealed)
        if record is None or record.model != self._model:
            self._foreign.add(prefix_id)
        elif prefix_id not in self._deleted:
            self.catalog.add(Published(record, expires_at))

    async def _give_back(self, lost: Iterable[Published], version: bytes) -> None:
        """Write records again to a Redis whose memory began anew."""
        self._version = version
        for published in lost:
            sealed = self._seal.seal(published.record)
            while (left_s := published.expires_at - self.catalog.clock()) > 0:
                if await self._write(published.record.id, sealed, left_s):
                    break
                self._version = await self._newest()
        log.info("published prefixes were given back to Redis")
        self._version = _life(self._version) + b".unread"  # others may have written meanwhile: read once more

    # Changing

    async def _write(self, prefix_id: str, sealed: bytes, ttl_s: float) -> bool:
        """Change one record if nobody changed anything since the last reading; whether that was so."""
        before = self._version or b""
        life = _life(before) or secrets.token_hex(8).encode()
        after = life + b"." + secrets.token_hex(8).encode()
        keys = [self._key("version"), self._key("ids"), self._key(prefix_id)]
        done = await self._change(keys=keys, args=[before, after, prefix_id, max(1, int(ttl_s * 1000)), sealed])
        if done:
            self._version = after
        return bool(done)

    async def _write_surely(self, prefix_id: str, sealed: bytes, ttl_s: float, decide: Callable[[], None]) -> None:
        """Change one record onto the state that `decide` saw and did not object to."""
        try:
            async with self._following:
                for _ in range(_ATTEMPTS):
                    await self._read()
                    decide()
                    if await self._write(prefix_id, sealed, ttl_s):
                        return
        except RedisError:
            log.warning("published prefixes: Redis is away")
        raise Unavailable("published prefixes cannot be changed now", reason="REGISTRY", retry_after_s=RETRY_AFTER_S)

    async def _newest(self) -> bytes:
        return bytes(await _answer(self._client.get(self._key("version"))) or b"")

    def _key(self, part: str) -> str:
        return self._base + part


def _life(version: bytes) -> bytes:
    return version.partition(b".")[0]


async def _answer(call: Any) -> Any:
    """redis-py types these calls as if they were for both kinds of client."""
    return await call
