"""A router's copy of the prefix index and of the leases, kept up to date from Redis.

Knows nothing of placement or of gRPC. Invariant: a worker's entries come from its newest epoch only, and every batch is
applied after the one before it; where that fails, that one worker is read again. While Redis is away the last state
stays, and a Redis that lost its memory does not unseat workers before they had time to come back.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from kvstore.block import WorkerId
from kvstore.events import decode, num_keys
from kvstore.lease import Lease, redis_key, view_leases
from kvstore.memory_index import MemoryIndex
from kvstore.redis_index import BATCH_FIELD, RedisIndexReader

_log = logging.getLogger(__name__)

_BATCHES_PER_READ = 32

LeaseChange = Callable[[WorkerId, Lease | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorTimes:
    """Seconds. `timeout` bounds every Redis call; `grace` is how long workers have to come back to a Redis that lost
    its memory; `block` is how long one read waits for events."""

    poll: float = 0.25
    block: float = 0.2
    timeout: float = 1.0
    grace: float = 5.0
    reload: float = 1.0
    backoff_first: float = 0.05
    backoff_most: float = 1.0


@dataclass(slots=True)
class MirrorCounts:
    """What the mirror has seen since it was made."""

    batches: int = 0
    blocks: int = 0
    gaps: int = 0
    loads: int = 0
    malformed: int = 0
    failures: int = 0


@dataclass(slots=True)
class _Followed:
    """One life of a worker: its lease, and how far its events are applied; `seq` None means it must be read."""

    lease: Lease
    stream: bytes
    seq: int | None = None
    load_after: float = 0.0
    missing_since: float | None = None
    promised: int = 0
    progress: int | None = None


class Mirror:
    """Feeds `index` from Redis and knows the leases. For one event loop.

    `on_lease_change(worker, lease)` is called for every lease that is new or differs, with None for one that ended.
    """

    def __init__(
        self,
        redis_url: str,
        cluster: str,
        index: MemoryIndex,
        *,
        on_lease_change: LeaseChange | None = None,
        times: MirrorTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_lease_change = on_lease_change
        self.connected = False
        self.counts = MirrorCounts()
        self._times = times or MirrorTimes()
        self._clock = clock
        self._cluster = cluster
        self._index = index
        self._client = redis.asyncio.Redis.from_url(
            redis_url,
            socket_timeout=self._times.timeout,
            socket_connect_timeout=self._times.timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self._reader = RedisIndexReader(self._client, cluster)
        self._followed: dict[WorkerId, _Followed] = {}
        self._next_poll = 0.0
        self._forgiving_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._first_look = asyncio.Event()

    async def start(self) -> None:
        """Begin to follow; returns once all workers that Redis names are read, or Redis was found to be away."""
        self._task = asyncio.create_task(self._run(), name="prefix-index-mirror")
        await self._first_look.wait()

    async def stop(self) -> None:
        """End the task and the connections; the index keeps what it has."""
        self._stopping = True
        while self._task is not None and not self._task.done():
            # More than once: `asyncio.wait_for` in Python 3.11, which redis-py sends with, can swallow a cancellation.
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=self._times.block)
        self._task = None
        self.connected = False
        await self._client.aclose()

    def leases(self) -> dict[WorkerId, Lease]:
        """The newest known lease of each living worker."""
        return {worker: followed.lease for worker, followed in self._followed.items()}

    def position(self) -> dict[WorkerId, tuple[int, int]]:
        """(epoch, seq) of the last batch applied, for each worker that is up to date."""
        return {w: (f.lease.epoch, f.seq) for w, f in self._followed.items() if f.seq is not None}

    async def _run(self) -> None:
        backoff = self._times.backoff_first
        while not self._stopping:
            try:
                await self._turn()
                backoff = self._times.backoff_first
                continue
            except RedisError as error:
                self._lost(str(error) or type(error).__name__)
            except Exception:  # noqa: BLE001  the mirror must outlive any defect in what it reads or calls
                _log.exception("the mirror failed in a turn and goes on")
                self._lost("internal error")
            self._first_look.set()
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._times.backoff_most)

    async def _turn(self) -> None:
        """Leases if they are due, workers that must be read, then new events."""
        now = self._clock()
        if now >= self._next_poll:
            await self._poll_leases()
            self._next_poll = now + self._times.poll
        for worker, followed in list(self._followed.items()):
            if followed.seq is None and now >= followed.load_after:
                await self._load(worker, followed)
        self._found()
        await self._tail()
        self._index.sweep()

    def _lost(self, why: str) -> None:
        self.counts.failures += 1
        if self.connected:
            _log.warning("lost the index at Redis, serving from the last state: %s", why)
        self.connected = False
        self._forgiving_until = math.inf

    def _found(self) -> None:
        if not self.connected:
            _log.info("following the index at Redis, %d workers", len(self._followed))
            if self._forgiving_until == math.inf:
                self._forgiving_until = self._clock() + self._times.grace
        self.connected = True
        self._first_look.set()

    async def _poll_leases(self) -> None:
        view = await view_leases(self._client, self._cluster)
        self.counts.malformed += view.malformed
        for worker, lease in view.leases.items():
            self._take_lease(worker, lease)
        now = self._clock()
        for worker in [worker for worker in self._followed if worker not in view.leases]:
            followed = self._followed[worker]
            if followed.missing_since is None:
                followed.missing_since = now
            forgiven = worker not in view.known or now < self._forgiving_until
            if not forgiven or now - followed.missing_since >= self._times.grace:
                self._drop(worker)

    def _take_lease(self, worker: WorkerId, lease: Lease) -> None:
        followed = self._followed.get(worker)
        if followed is not None and _life(followed.lease) == _life(lease):
            changed = followed.lease != lease
            followed.lease = lease
            followed.missing_since = None
            self._check_promise(followed)
        else:
            self._index.remove_worker(worker)
            stream = redis_key(self._cluster, worker, "events").encode()
            self._followed[worker] = _Followed(lease, stream)
            changed = True
        if changed and self.on_lease_change is not None:
            self.on_lease_change(worker, lease)

    def _check_promise(self, followed: _Followed) -> None:
        """A lease that names a later batch than we have, with no progress since, means that batches were lost."""
        if followed.seq is not None and followed.seq < followed.promised and followed.seq == followed.progress:
            self._open_gap(followed)
        followed.promised = followed.lease.seq
        followed.progress = followed.seq

    def _drop(self, worker: WorkerId) -> None:
        del self._followed[worker]
        self._index.remove_worker(worker)
        if self.on_lease_change is not None:
            self.on_lease_change(worker, None)

    def _open_gap(self, followed: _Followed) -> None:
        self.counts.gaps += 1
        followed.seq = None

    async def _load(self, worker: WorkerId, followed: _Followed) -> None:
        """Read a worker's current set beside what the index has, then switch."""
        followed.load_after = self._clock() + self._times.reload
        try:
            current = await self._reader.current_set(worker)
            if current is None or current.epoch != followed.lease.epoch:
                followed.load_after = self._clock() + self._times.poll
                return
            loading = self._index.load(worker, current.epoch)
            try:
                async for tier, keys in self._reader.keys(worker, current):
                    loading.store(tier, keys)
            except BaseException:
                loading.abandon()
                raise
        except LookupError:
            followed.load_after = 0.0
            return
        except ResponseError:
            self.counts.malformed += 1
            return
        loading.commit()
        self.counts.loads += 1
        followed.seq = current.seq

    async def _tail(self) -> None:
        """Wait a little for new batches of all workers that have been read, and apply them."""
        cursors = {
            followed.stream: f"{followed.lease.epoch}-{followed.seq}"
            for followed in self._followed.values()
            if followed.seq is not None
        }
        if not cursors:
            await asyncio.sleep(min(self._times.poll, self._times.block))
            return
        block_ms = max(1, int(self._times.block * 1000))
        try:
            answer: Any = await self._client.xread(cursors, count=_BATCHES_PER_READ, block=block_ms)  # type: ignore[arg-type]
        except ResponseError:
            await self._find_bad_stream(cursors)
            return
        by_stream = {followed.stream: (worker, followed) for worker, followed in self._followed.items()}
        for stream, entries in answer or ():
            worker, followed = by_stream[stream]
            for entry_id, fields in entries:
                if not self._take_entry(worker, followed, entry_id, fields):
                    break
            await asyncio.sleep(0)

    async def _find_bad_stream(self, cursors: dict[bytes, str]) -> None:
        """One key that is no stream fails the read of all; its worker is read again later, the others go on."""
        for followed in self._followed.values():
            if followed.stream not in cursors:
                continue
            try:
                await self._client.xread({followed.stream: cursors[followed.stream]}, count=1)
            except ResponseError:
                self.counts.malformed += 1
                self._open_gap(followed)

    def _take_entry(
        self, worker: WorkerId, followed: _Followed, entry_id: bytes, fields: dict[bytes, bytes] | None
    ) -> bool:
        """Apply one stream entry; False if the worker must be read again."""
        assert followed.seq is not None
        expected = f"{followed.lease.epoch}-{followed.seq + 1}".encode()
        if entry_id != expected:
            self._open_gap(followed)
            return False
        try:
            batch = decode((fields or {})[BATCH_FIELD])
        except (KeyError, msgspec.MsgspecError):
            self.counts.malformed += 1
            self._open_gap(followed)
            return False
        self._index.apply(worker, followed.lease.epoch, batch.events)
        followed.seq += 1
        self.counts.batches += 1
        self.counts.blocks += num_keys(batch.events)
        return True


def _life(lease: Lease) -> tuple[int, str]:
    """What two lives of a worker differ in."""
    return lease.epoch, lease.life
