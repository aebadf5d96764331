"""The prefix index in Redis: a stream of event batches and a compact current set for each worker.

Knows nothing of pools or routers. Invariant: a batch reaches the stream and the current set in one script that checks
the epoch, so both always agree and a fenced worker changes neither. Redis holds keyed digests only.

    {cluster}:{worker}:epoch    counter of lives
    {cluster}:{worker}:meta     epoch, seq, set, buckets; pending, pending_buckets while a snapshot is written
    {cluster}:{worker}:events   stream; entry <epoch>-<seq> carries one msgpack EventBatch in field "b"
    {cluster}:{worker}:set:<set>:<tier>:<bucket>    hash of 16-byte keys, small enough for Redis' packed form
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import msgspec
import redis
import redis.asyncio
from redis.exceptions import RedisError
from redis.typing import EncodableT

from kvstore.events import CPU, DEVICE, BlocksRemoved, BlocksStored, Cleared, Event, EventBatch, TierChanged, encode
from kvstore.lease import check_fence, redis_key

BATCH_FIELD = b"b"
KEY_BYTES = 16
_KEYS_PER_BUCKET = 96  # on average; Redis packs hashes of up to 512 entries
_KEYS_PER_CALL = 4096
_BUCKETS_PER_READ = 128
_STALE = -1


class RedisIndexWriter:
    """Publishes the resident blocks of one life of a worker. For the publisher's thread.

    `capacity` is the number of blocks of all tiers. The writer remembers what is resident, so a Redis that was away or
    lost its memory is brought up to date by `repair`, without the engine. Until the first `repair` nothing is written.
    """

    def __init__(
        self, client: redis.Redis, cluster: str, worker_id: str, epoch: int, *, capacity: int, max_batches: int = 8192
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.in_sync = False
        """Whether Redis held everything when it was last heard."""
        self.snapshots = 0
        self.failures = 0
        self._seq = 0
        self._acknowledged = 0
        self._resident: tuple[set[bytes], set[bytes]] = (set(), set())
        self._max_batches = max_batches
        self._buckets = max(1, -(-capacity // _KEYS_PER_BUCKET))
        self._keys = [redis_key(cluster, worker_id, part) for part in ("epoch", "meta", "events")]
        self._base = redis_key(cluster, worker_id, "set:")
        self._publish = client.register_script(_FENCE + _PUBLISH)
        self._begin = client.register_script(_FENCE + _BEGIN)
        self._add = client.register_script(_FENCE + _ADD)
        self._commit = client.register_script(_FENCE + _COMMIT)
        self._probe = client.register_script(_FENCE + _PROBE)

    @property
    def seq(self) -> int:
        """Number of the last batch that Redis is known to have."""
        return self._acknowledged

    @property
    def num_blocks(self) -> int:
        """Resident blocks, each tier counted."""
        return sum(map(len, self._resident))

    def publish(self, events: Sequence[Event]) -> bool:
        """Append what changed. False if Redis was not reached or has lost its state: `repair` makes up for it.

        Raises `Fenced` if the worker has a newer life.
        """
        for part in _split(events):
            self._fold(part)
            self._seq += 1
            if self.in_sync:
                payload = encode(EventBatch(self.worker_id, self.epoch, self._seq, part))
                self.in_sync = self._call(
                    self._publish, self._seq, self._seq - 1, payload, self._max_batches, *_operations(part)
                )
        return self.in_sync

    def repair(self) -> bool:
        """Make sure that Redis holds what is resident, with a snapshot if it does not; call it at every heartbeat.

        Raises `Fenced` if the worker has a newer life.
        """
        if self.in_sync:
            self.in_sync = self._call(self._probe, self._seq)
        return self.in_sync or self.publish_snapshot()

    def publish_snapshot(self) -> bool:
        """Write all that is resident as a new current set, which replaces the old one in one step."""
        self.snapshots += 1
        self._seq += 1
        name = f"{self.epoch}.{self.snapshots}"
        self.in_sync = self._call(self._begin, self._seq, name, self._buckets) and self._fill(name)
        if self.in_sync:
            marker = encode(EventBatch(self.worker_id, self.epoch, self._seq, []))
            self.in_sync = self._call(self._commit, self._seq, name, marker, self._max_batches)
        return self.in_sync

    def _fill(self, name: str) -> bool:
        for tier in (DEVICE, CPU):
            keys = iter(self._resident[tier])
            while chunk := b"".join(itertools.islice(keys, _KEYS_PER_CALL)):
                if not self._call(self._add, self._seq, name, tier, chunk):
                    return False
        return True

    def _call(self, script: redis.commands.core.Script, seq: int, *args: EncodableT) -> bool:
        """Run a script; True if it did its work. All take keys, epoch, bucket prefix and seq first."""
        try:
            answer = script(keys=self._keys, args=[self.epoch, self._base, seq, *args])
        except RedisError:
            self.failures += 1
            return False
        check_fence(self.worker_id, self.epoch, answer)
        if answer == _STALE:
            self.failures += 1
            return False
        self._acknowledged = seq if script in (self._publish, self._commit) else self._acknowledged
        return True

    def _fold(self, events: Iterable[Event]) -> None:
        """Apply the events to our own record of what is resident."""
        for event in events:
            if isinstance(event, BlocksStored):
                self._resident[event.tier].update(event.keys)
            elif isinstance(event, BlocksRemoved):
                self._resident[event.tier].difference_update(event.keys)
            elif isinstance(event, TierChanged):
                self._resident[event.tier].update(event.keys)
                self._resident[CPU if event.tier == DEVICE else DEVICE].difference_update(event.keys)
            else:
                self._resident[DEVICE].clear()
                self._resident[CPU].clear()


class CurrentSet(msgspec.Struct, frozen=True):
    """A worker's current set as its meta entry names it. `seq` is the last batch that is surely in it."""

    epoch: int
    seq: int
    name: str
    buckets: int


class RedisIndexReader:
    """Reads current sets. For one event loop; Redis errors reach the caller."""

    def __init__(self, client: redis.asyncio.Redis, cluster: str) -> None:
        self._client = client
        self._cluster = cluster
        self._read = client.register_script(_READ)

    async def current_set(self, worker_id: str) -> CurrentSet | None:
        """What the worker has published, None if nothing complete is there."""
        raw: list[Any] = await self._client.hmget(
            redis_key(self._cluster, worker_id, "meta"), ["epoch", "seq", "set", "buckets"]
        )
        if any(value is None for value in raw):
            return None
        try:
            return CurrentSet(int(raw[0]), int(raw[1]), raw[2].decode(), int(raw[3]))
        except ValueError:
            return None

    async def keys(self, worker_id: str, current: CurrentSet) -> AsyncIterator[tuple[int, list[bytes]]]:
        """(tier, keys) of the set in chunks; raises LookupError if a newer set has taken its place.

        Batches published while this runs may be in it or not: whoever then applies all batches after `current.seq`
        has the exact state.
        """
        meta, base = (redis_key(self._cluster, worker_id, part) for part in ("meta", "set:"))
        for tier in (DEVICE, CPU):
            for first in range(0, current.buckets, _BUCKETS_PER_READ):
                last = min(first + _BUCKETS_PER_READ, current.buckets) - 1
                blob = await self._read(keys=[meta], args=[base, current.name, tier, first, last])
                if blob is None:
                    raise LookupError("the current set was replaced")
                if blob:
                    yield tier, [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


def _split(events: Sequence[Event]) -> Iterable[list[Event]]:
    """The events in batches whose keys one script call can take."""
    batch: list[Event] = []
    room = _KEYS_PER_CALL
    for event in events:
        if isinstance(event, Cleared):
            batch.append(event)
            continue
        for first in range(0, len(event.keys), _KEYS_PER_CALL):
            part = msgspec.structs.replace(event, keys=event.keys[first : first + _KEYS_PER_CALL])
            if len(part.keys) > room:
                yield batch
                batch, room = [], _KEYS_PER_CALL
            batch.append(part)
            room -= len(part.keys)
    if batch:
        yield batch


def _operations(events: Iterable[Event]) -> Iterable[bytes]:
    """The events as Redis' own scripts can read them: kind and tier, then the keys in one string."""
    for event in events:
        if isinstance(event, Cleared):
            yield b"C0"
            yield b""
            continue
        yield b"%s%d" % (_KINDS[type(event)], event.tier)
        yield b"".join(event.keys)


_KINDS: dict[type, bytes] = {BlocksStored: b"S", BlocksRemoved: b"R", TierChanged: b"T"}


# Every script: KEYS epoch, meta, events; ARGV epoch, bucket prefix, seq. It returns the newest epoch, or -1 if Redis
# does not hold the state that the call builds on.
_FENCE = """
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
if newest > tonumber(ARGV[1]) then return newest end
local base = ARGV[2]

local function bucket(set, tier, buckets, key)
  local a, b, c = string.byte(key, 1, 3)
  return base .. set .. ':' .. tier .. ':' .. ((a + b * 256 + c * 65536) % buckets)
end

local function drop(set, buckets)
  for tier = 0, 1 do
    for i = 0, tonumber(buckets) - 1 do redis.call('UNLINK', base .. set .. ':' .. tier .. ':' .. i) end
  end
end

local function append(payload, limit)
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', limit, ARGV[1] .. '-' .. ARGV[3], 'b', payload)
end
"""

# ARGV from 7 on: for each event its kind with its tier ("S0"), and its keys in one string.
_PUBLISH = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq', 'set', 'buckets')
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[4] or not meta[3] then return -1 end
local set, buckets = meta[3], tonumber(meta[4])
append(ARGV[5], ARGV[6])
for i = 7, #ARGV, 2 do
  local kind, tier, keys = string.sub(ARGV[i], 1, 1), tonumber(string.sub(ARGV[i], 2)), ARGV[i + 1]
  if kind == 'C' then drop(set, buckets) end
  for at = 1, #keys, 16 do
    local key = string.sub(keys, at, at + 15)
    if kind == 'R' then
      redis.call('HDEL', bucket(set, tier, buckets, key), key)
    else
      redis.call('HSET', bucket(set, tier, buckets, key), key, '')
      if kind == 'T' then redis.call('HDEL', bucket(set, 1 - tier, buckets, key), key) end
    end
  end
end
redis.call('HSET', KEYS[2], 'seq', ARGV[3])
return newest
"""

_PROBE = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq')
if meta[1] ~= ARGV[1] or meta[2] ~= ARGV[3] then return -1 end
return newest
"""

_BEGIN = """
local meta = redis.call('HMGET', KEYS[2], 'epoch', 'seq', 'set', 'buckets', 'pending', 'pending_buckets')
if meta[5] then drop(meta[5], meta[6]) end
if meta[1] ~= ARGV[1] or tonumber(meta[2] or '0') >= tonumber(ARGV[3]) then
  if meta[3] then drop(meta[3], meta[4]) end
  redis.call('DEL', KEYS[2], KEYS[3])
end
redis.call('HSET', KEYS[2], 'epoch', ARGV[1], 'pending', ARGV[4], 'pending_buckets', ARGV[5])
return newest
"""

_ADD = """
local meta = redis.call('HMGET', KEYS[2], 'pending', 'pending_buckets')
if meta[1] ~= ARGV[4] then return -1 end
local buckets = tonumber(meta[2])
for at = 1, #ARGV[6], 16 do
  local key = string.sub(ARGV[6], at, at + 15)
  redis.call('HSET', bucket(ARGV[4], ARGV[5], buckets, key), key, '')
end
return newest
"""

_COMMIT = """
local meta = redis.call('HMGET', KEYS[2], 'pending', 'pending_buckets', 'set', 'buckets')
if meta[1] ~= ARGV[4] then return -1 end
append(ARGV[5], ARGV[6])
redis.call('HSET', KEYS[2], 'set', meta[1], 'buckets', meta[2], 'seq', ARGV[3])
redis.call('HDEL', KEYS[2], 'pending', 'pending_buckets')
if meta[3] then drop(meta[3], meta[4]) end
return newest
"""

_READ = """
if redis.call('HGET', KEYS[1], 'set') ~= ARGV[2] then return false end
local parts = {}
for i = tonumber(ARGV[4]), tonumber(ARGV[5]) do
  local keys = redis.call('HKEYS', ARGV[1] .. ARGV[2] .. ':' .. ARGV[3] .. ':' .. i)
  for _, key in ipairs(keys) do parts[#parts + 1] = key end
end
return table.concat(parts)
"""
