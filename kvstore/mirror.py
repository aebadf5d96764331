"""A router's copy of the prefix index and of the leases, kept up to date from Redis.

Knows nothing of placement or of gRPC; `following` decides what is to be read. Invariant: no turn of it ends the mirror.
While Redis is away the last state stays, and a Redis that lost its memory does not unseat workers before they had time
to come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from kvstore.block import WorkerId
from kvstore.following import Followed, Following, LeaseChange, MirrorCounts, MirrorTimes
from kvstore.lease import Lease, view_leases
from kvstore.memory_index import MemoryIndex
from kvstore.redis_index import BATCH_FIELD, RedisIndexReader
from kvstore.task_end import end

_log = logging.getLogger(__name__)

_BATCHES_PER_READ = 32
_LOADS_AT_ONCE = 3

__all__ = ["Mirror", "MirrorTimes"]


class Mirror:
    """Feeds `index` from Redis and knows the leases. For one event loop.

    `on_lease_change(worker, lease)` is called for every lease that is new or differs, with None for one that ended.
    `following` takes what workers say over their links while Redis is away.
    """

    def __init__(
        self,
        source: str | redis.asyncio.Redis,
        cluster: str,
        index: MemoryIndex,
        *,
        on_lease_change: LeaseChange | None = None,
        times: MirrorTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`source` is the URL of Redis, or a client, which is then the mirror's to close."""
        self.connected = False
        self._times = times or MirrorTimes()
        self._clock = clock
        self._cluster = cluster
        self._client = _client(source, self._times.timeout) if isinstance(source, str) else source
        self._reader = RedisIndexReader(self._client, cluster)
        self.following = Following(index, cluster, self._times, clock)
        self.following.on_lease_change = on_lease_change
        self._index = index
        self._next_poll = 0.0
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._first_look = asyncio.Event()

    @property
    def counts(self) -> MirrorCounts:
        """What the mirror has seen since it was made."""
        return self.following.counts

    @property
    def on_lease_change(self) -> LeaseChange | None:
        return self.following.on_lease_change

    @on_lease_change.setter
    def on_lease_change(self, listener: LeaseChange | None) -> None:
        self.following.on_lease_change = listener

    async def start(self) -> None:
        """Begin to follow; returns once all workers that Redis names are read, or Redis was found to be away."""
        self._task = asyncio.create_task(self._run(), name="prefix-index-mirror")
        await self._first_look.wait()

    async def stop(self) -> None:
        """End the task and the connections; the index keeps what it has."""
        self._stopping = True
        if self._task is not None:
            await end(self._task)
        self._task = None
        self.connected = False
        await self._client.aclose()

    def leases(self) -> dict[WorkerId, Lease]:
        """The newest known lease of each living worker."""
        return {worker: followed.lease for worker, followed in self.following.workers.items()}

    def position(self) -> dict[WorkerId, tuple[int, int]]:
        """(epoch, seq) of the last batch applied, for each worker that is up to date."""
        workers = self.following.workers.items()
        return {w: (f.lease.epoch, f.seq) for w, f in workers if f.seq is not None}

    async def turn(self) -> None:
        """Leases if they are due, workers that must be read, then new events; waits a little for those."""
        now = self._clock()
        if now >= self._next_poll:
            self.following.take_view(await view_leases(self._client, self._cluster))
            self._next_poll = now + self._times.poll
        await self._load_all()
        self._found()
        await self._tail()
        self._index.sweep()

    async def _run(self) -> None:
        backoff = self._times.backoff_first
        while not self._stopping:
            try:
                await self.turn()
                backoff = self._times.backoff_first
                continue
            except RedisError as error:
                self.lost(str(error) or type(error).__name__)
            except Exception:  # noqa: BLE001  the mirror must outlive any defect in what it reads or calls
                _log.exception("the mirror failed in a turn and goes on")
                self.lost("internal error")
            self._first_look.set()
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._times.backoff_most)

    def lost(self, why: str) -> None:
        """Redis did not answer in a turn."""
        self.counts.failures += 1
        if self.connected:
            _log.warning("lost the index at Redis, serving from the last state: %s", why)
        self.connected = False
        self.following.lost()

    def _found(self) -> None:
        if not self.connected:
            _log.info("following the index at Redis, %d workers", len(self.following.workers))
            self.following.found()
        self.connected = True
        self._first_look.set()

    async def _load_all(self) -> None:
        """Read the workers that must be read, a few at once: Redis works on one while another is taken in."""
        waiting = self.following.to_load()
        if not waiting:
            return

        async def some() -> None:
            while waiting:
                await self._load(*waiting.pop())

        for failure in await asyncio.gather(*(some() for _ in range(_LOADS_AT_ONCE)), return_exceptions=True):
            if failure is not None:
                raise failure

    async def _load(self, worker: WorkerId, followed: Followed) -> None:
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
                settled = await self._reader.seq(worker)
            except BaseException:
                loading.abandon()
                raise
        except LookupError:
            followed.load_after = 0.0
            return
        except ResponseError:
            self.counts.malformed += 1
            return
        self.following.loaded(worker, followed, loading, current.seq, settled)

    async def _tail(self) -> None:
        """Wait a little for new batches of all workers that have been read, and apply them."""
        workers = self.following.workers
        cursors = {f.stream: f"{f.lease.epoch}-{f.seq}" for f in workers.values() if f.seq is not None}
        if not cursors:
            await asyncio.sleep(min(self._times.poll, self._times.block))
            return
        block_ms = max(1, int(self._times.block * 1000))
        try:
            answer: Any = await self._client.xread(cursors, count=_BATCHES_PER_READ, block=block_ms)  # type: ignore[arg-type]
        except ResponseError:
            await self._find_bad_stream(cursors)
            return
        by_stream = {followed.stream: worker for worker, followed in workers.items()}
        for stream, entries in answer or ():
            worker = by_stream.get(stream)
            for entry_id, fields in entries:
                if worker is None or not self.following.take_entry(worker, entry_id, (fields or {}).get(BATCH_FIELD)):
                    break
            await asyncio.sleep(0)

    async def _find_bad_stream(self, cursors: dict[bytes, str]) -> None:
        """One key that is no stream fails the read of all; its worker is read again later, the others go on."""
        for followed in list(self.following.workers.values()):
            if followed.stream not in cursors:
                continue
            try:
                await self._client.xread({followed.stream: cursors[followed.stream]}, count=1)
            except ResponseError:
                self.counts.malformed += 1
                self.following.must_load(followed)


def _client(url: str, timeout_s: float) -> redis.asyncio.Redis:
    return redis.asyncio.Redis.from_url(
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )
