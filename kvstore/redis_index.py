"""The prefix index in Redis: a stream of event batches and a compact current set for each worker.

Knows nothing of pools or routers. Invariant: a batch reaches the stream and the current set in one script that checks
the epoch, so both always agree and a fenced worker changes neither. Redis holds keyed digests only.

    {cluster}:{worker}:epoch    counter of lives
    {cluster}:{worker}:meta     epoch, seq, set, buckets; pending, pending_buckets while a snapshot is written
    {cluster}:{worker}:events   stream; entry <epoch>-<seq> carries one msgpack EventBatch in field "b"
    {cluster}:{worker}:set:<set>:<tier>:<bucket>    hash of 16-byte keys, small enough for Redis' packed form
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any

import msgspec
import redis
import redis.asyncio
from redis.exceptions import RedisError
from redis.typing import EncodableT

from kvstore import redis_scripts as scripts
from kvstore.events import CPU, DEVICE, KEY_BYTES, BlocksRemoved, BlocksStored, Cleared, Event, TierChanged
from kvstore.lease import check_fence, redis_key
from kvstore.ledger import KEYS_PER_BATCH, Ledger, Position, Recorded

BATCH_FIELD = b"b"
_KEYS_PER_BUCKET = 96  # on average; Redis packs hashes of up to 512 entries
_BUCKETS_PER_READ = 32
_MOST_AT_ONCE = 512  # keys in one command of a script
_STALE = -1


class RedisIndexWriter:
    """Publishes the resident blocks of one life of a worker. For the publisher's thread.

    `capacity` is the number of blocks of all tiers. The `ledger` remembers what is resident, so a Redis that was away
    or lost its memory is brought up to date by `repair` without the engine. The first `repair` is what begins to write.
    `bulk` is a client that waits longer, for snapshots.
    """

    def __init__(
        self,
        client: redis.Redis,
        cluster: str,
        ledger: Ledger,
        *,
        capacity: int,
        max_batches: int = 8192,
        bulk: redis.Redis | None = None,
    ) -> None:
        self.ledger = ledger
        self.acknowledged = Position()
        """The newest state that Redis is known to have."""
        self.in_sync = False
        """Whether Redis held everything when it was last heard."""
        self.snapshots = 0
        self.replays = 0
        self.failures = 0
        self._name = ""  # of the newest set that we wrote or tried to
        self._life = secrets.token_hex(4)
        self._max_batches = max_batches
        self._buckets = max(1, -(-capacity // _KEYS_PER_BUCKET))
        self._keys = [redis_key(cluster, ledger.worker_id, part) for part in ("epoch", "meta", "events")]
        self._base = redis_key(cluster, ledger.worker_id, "set:")
        bulk = bulk or client
        self._publish = client.register_script(scripts.FENCE + scripts.PUBLISH)
        self._probe = client.register_script(scripts.FENCE + scripts.PROBE)
        self._begin = bulk.register_script(scripts.FENCE + scripts.BEGIN)
        self._add = bulk.register_script(scripts.FENCE + scripts.ADD)
        self._commit = bulk.register_script(scripts.FENCE + scripts.COMMIT)

    def publish(self, events: Sequence[Event]) -> bool:
        """Append what changed. False if Redis was not reached or has lost its state: `repair` makes up for it.

        Raises `Fenced` if the worker has a newer life.
        """
        for recorded in self.ledger.record(events):
            if self.in_sync:
                self.in_sync = self._append(recorded)
        return self.in_sync

    def repair(self, between: Callable[[], None] = lambda: None) -> bool:
        """Make sure that Redis holds what is resident; call it at every heartbeat.

        What Redis missed is appended if it is still kept, else all is written anew, with calls of `between` on the way.
        Raises `Fenced` if the worker has a newer life.
        """
        answer = self._run(self._probe, self.ledger.position.seq)
        self.in_sync = False
        if answer is None:
            return False
        _, seq, name = answer
        missing = self.ledger.since(int(seq)) if seq and name.decode() == self._name else None
        if missing is None:
            return self.publish_snapshot(between)
        self.replays += bool(missing)
        self.in_sync = all(map(self._append, missing))
        if self.in_sync:
            self.acknowledged = self.ledger.position
        return self.in_sync

    def publish_snapshot(self, between: Callable[[], None] = lambda: None) -> bool:
        """Write all that is resident as a new current set, which replaces the old one in one step."""
        self.snapshots += 1
        self._name = name = f"{self.ledger.epoch}.{self._life}.{self.snapshots}"
        self.in_sync = False
        if not self._done(self._begin, self.ledger.position.seq + 1, name, self._buckets):
            return False
        for tier in (DEVICE, CPU):
            for parts in self._by_bucket(tier):
                if not self._done(self._add, self.ledger.position.seq + 1, name, tier, *parts):
                    return False
                between()
        marker = self.ledger.mark()
        self.in_sync = self._done(self._commit, marker.position.seq, name, marker.payload, self._max_batches)
        if self.in_sync:
            self.acknowledged = marker.position
        return self.in_sync

    def _by_bucket(self, tier: int) -> Iterator[list[bytes]]:
        """The resident keys of a tier, a call's worth at a time, those of one bucket together: Redis finds it once."""
        buckets: dict[int, list[bytes]] = {}
        for key in self.ledger.keys(tier):
            buckets.setdefault(int.from_bytes(key[:3], "little") % self._buckets, []).append(key)
        parts: list[bytes] = []
        room = KEYS_PER_BATCH
        for keys in buckets.values():
            for first in range(0, len(keys), _MOST_AT_ONCE):
                part = keys[first : first + _MOST_AT_ONCE]
                parts.append(b"".join(part))
                room -= len(part)
                if room <= 0:
                    yield parts
                    parts, room = [], KEYS_PER_BATCH
        if parts:
            yield parts

    def _append(self, recorded: Recorded) -> bool:
        seq = recorded.position.seq
        arguments: list[EncodableT] = [
            seq - 1,
            recorded.payload,
            self._max_batches,
            self._name,
            *_operations(recorded.events),
        ]
        done = self._done(self._publish, seq, *arguments)
        if done:
            self.acknowledged = recorded.position
        return done

    def _done(self, script: redis.commands.core.Script, seq: int, *args: EncodableT) -> bool:
        """Run a script; whether it did its work."""
        answer = self._run(script, seq, *args)
        if answer == _STALE:
            self.failures += 1
        return answer not in (None, _STALE)

    def _run(self, script: redis.commands.core.Script, seq: int, *args: EncodableT) -> Any:
        """A script's answer, None if there is none. All take keys, epoch, bucket prefix and seq first."""
        try:
            answer = script(keys=self._keys, args=[self.ledger.epoch, self._base, seq, *args])
        except RedisError:
            self.failures += 1
            return None
        newest = answer[0] if isinstance(answer, list) else answer
        check_fence(self.ledger.worker_id, self.ledger.epoch, newest)
        return answer


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
        self._read = client.register_script(scripts.READ)

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

    async def seq(self, worker_id: str) -> int:
        """Number of the last batch that is in the current set by now; 0 if there is none."""
        raw = await self._client.hget(redis_key(self._cluster, worker_id, "meta"), "seq")
        return int(raw or 0)

    async def keys(self, worker_id: str, current: CurrentSet) -> AsyncIterator[tuple[int, list[bytes]]]:
        """(tier, keys) of the set in chunks; raises LookupError if a newer set has taken its place.

        Batches published while this runs may be in it or not: whoever then applies all batches after `current.seq`
        has the exact state.
        """
        meta, base = (redis_key(self._cluster, worker_id, part) for part in ("meta", "set:"))
        for tier in (DEVICE, CPU):
            for first in range(0, current.buckets, _BUCKETS_PER_READ):
                last = min(first + _BUCKETS_PER_READ, current.buckets) - 1
                blob = await self._read(keys=[], args=[meta, base, current.name, tier, first, last])
                if blob is None:
                    raise LookupError("the current set was replaced")
                if blob:
                    yield tier, [blob[at : at + KEY_BYTES] for at in range(0, len(blob), KEY_BYTES)]


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
