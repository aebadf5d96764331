"""What a router believes of each worker's blocks, and what it must read or ask for next.

Knows no network: whoever has one hands in what came, in whatever order, and asks what is missing. Invariant: entries of
a worker come from its newest epoch only, and every batch is applied after the one before it; where that fails, or where
the state differs from the digest of the worker's own, that one worker is read again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from kvstore.block import WorkerId
from kvstore.events import KEY_BYTES, EventBatch, decode, num_keys
from kvstore.lease import Lease, LeaseView, redis_key
from kvstore.ledger import SnapshotPart
from kvstore.memory_index import Loading, MemoryIndex

_log = logging.getLogger(__name__)

_RELOADS_SKIPPED = 10

LeaseChange = Callable[[WorkerId, Lease | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorTimes:
    """Seconds. `timeout` bounds every Redis call; `grace` is how long workers have to come back to a Redis that lost
    its memory; `block` is how long one read waits for events; `reload` is the least time between two readings of one
    worker."""

    poll: float = 0.25
    block: float = 0.2
    timeout: float = 0.5
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
    mismatches: int = 0
    loads: int = 0
    fed: int = 0
    malformed: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class FeedRequest:
    """What a worker is asked over its link: block events after batch `seq`, or all it holds and those after it where
    `seq` is 0; no more events; or a new set in Redis."""

    kind: Literal["follow", "unfollow", "republish"]
    seq: int = 0


@dataclass(slots=True)
class Followed:
    """One life of a worker: its lease, and how far its events are applied; `seq` None means it must be read."""

    lease: Lease
    stream: bytes
    seq: int | None = None
    settled: int = 0  # from this batch on the state is exact: a set that is read while it changes is not, at first
    load_after: float = 0.0
    missing_since: float | None = None
    promised: int = 0
    progress: int | None = None
    doubted: bool = False  # its digest differed, and was not equal since
    ask: Callable[[FeedRequest], None] | None = None  # its link, if there is one
    feeding: bool = False
    asked_at: float = -math.inf
    loading: Loading | None = None  # a snapshot that comes over the link


class Following:
    """Keeps `index` at what the workers say. For one event loop.

    `on_lease_change(worker, lease)` is called for every lease that is new or differs, with None for one that ended.
    """

    def __init__(self, index: MemoryIndex, cluster: str, times: MirrorTimes, clock: Callable[[], float]) -> None:
        self.on_lease_change: LeaseChange | None = None
        self.on_read: Callable[[WorkerId, Lease], None] = lambda worker, lease: None
        """Called when all that a worker holds was read."""
        self.counts = MirrorCounts()
        self.workers: dict[WorkerId, Followed] = {}
        self._index = index
        self._cluster = cluster
        self._times = times
        self._clock = clock
        self._forgiving_until = 0.0
        self._redis_is_away = False  # a link that is up before the first reading is over has nothing to add

    # Redis

    def lost(self) -> None:
        """Redis is away: what is known stays, and links are asked for events."""
        self._redis_is_away = True
        self._forgiving_until = math.inf
        self._ask_all()

    def found(self) -> None:
        """Redis answers, again or for the first time."""
        if self._forgiving_until == math.inf:
            self._forgiving_until = self._clock() + self._times.grace
        self._redis_is_away = False
        self._ask_all()

    def take_view(self, view: LeaseView) -> None:
        """The leases as Redis has them."""
        self.counts.malformed += view.malformed
        for worker, lease in view.leases.items():
            self._take_lease(worker, lease)
        now = self._clock()
        for worker in [worker for worker in self.workers if worker not in view.leases]:
            followed = self.workers[worker]
            if followed.missing_since is None:
                followed.missing_since = now
            if followed.ask is not None:  # it lives, and only its way to Redis is cut: its link goes on
                self._ask_for_feed(followed)
                continue
            forgiven = worker not in view.known or now < self._forgiving_until
            if not forgiven or now - followed.missing_since >= self._times.grace:
                self._drop(worker)

    def to_load(self) -> list[tuple[WorkerId, Followed]]:
        """Workers whose current set must be read from Redis now."""
        now = self._clock()
        return [
            (worker, followed)
            for worker, followed in self.workers.items()
            if followed.seq is None and now >= followed.load_after
        ]

    def loaded(self, worker: WorkerId, followed: Followed, loading: Loading, seq: int, settled: int) -> None:
        """A current set was read that has all batches up to `seq` and none after `settled`."""
        if self.workers.get(worker) is not followed:
            loading.abandon()
            return
        loading.commit()
        self.counts.loads += 1
        followed.seq = seq
        followed.settled = settled
        self.on_read(worker, followed.lease)

    def take_entry(self, worker: WorkerId, entry_id: bytes, payload: bytes | None) -> bool:
        """Apply one stream entry; False if the worker must be read again."""
        followed = self.workers.get(worker)
        if followed is None or followed.seq is None:
            return False
        batch = _decoded(payload)
        if batch is None or entry_id != b"%d-%d" % (batch.epoch, batch.seq):
            self.counts.malformed += 1
            self.must_load(followed)
            return False
        if not self._take_batch(worker, followed, batch):
            self.must_load(followed)
            return False
        return True

    def must_load(self, followed: Followed) -> None:
        """What is known of a worker is not what it holds."""
        self.counts.gaps += 1
        followed.seq = None

    # Links

    def link_up(self, worker: WorkerId, epoch: int, ask: Callable[[FeedRequest], None]) -> None:
        """There is a session with this life of a worker, on which it can be asked."""
        followed = self.workers.get(worker)
        if followed is not None and followed.lease.epoch == epoch:
            followed.ask = ask
            followed.feeding = False
            followed.asked_at = -math.inf
            if self._redis_is_away:
                self._ask_for_feed(followed)

    def link_down(self, worker: WorkerId, ask: Callable[[FeedRequest], None]) -> None:
        """The session is over."""
        followed = self.workers.get(worker)
        if followed is not None and followed.ask == ask:
            followed.ask = None
            followed.feeding = False
            self._end_snapshot(followed)

    def take_feed(self, worker: WorkerId, epoch: int, payloads: Sequence[bytes]) -> None:
        """Batches that came over a link; Redis may have brought them before, or may still."""
        followed = self.workers.get(worker)
        if followed is None or followed.lease.epoch != epoch or followed.loading is not None:
            return
        for payload in payloads:
            batch = _decoded(payload)
            if batch is None or followed.seq is None or not self._take_batch(worker, followed, batch):
                self.counts.malformed += batch is None
                if batch is not None and batch.seq == followed.seq:
                    followed.seq = None  # applied, and yet not what the worker has
                self._missed(followed)
                return
            self.counts.fed += 1

    def take_snapshot(self, worker: WorkerId, epoch: int, part: SnapshotPart) -> None:
        """A part of all that a worker holds, from its link, in order."""
        followed = self.workers.get(worker)
        if followed is None or followed.lease.epoch != epoch:
            return
        if part.is_first:
            self._end_snapshot(followed)
            followed.loading = self._index.load(worker, epoch)
        if followed.loading is None:
            return
        keys = [part.keys[at : at + KEY_BYTES] for at in range(0, len(part.keys), KEY_BYTES)]
        followed.loading.store(part.tier, keys)
        if part.is_last:
            loading, followed.loading = followed.loading, None
            self.loaded(worker, followed, loading, part.position.seq, part.position.seq)
            if not self._check(worker, followed, part.position.digest):
                followed.seq = None
                self._missed(followed)

    # Inside

    def _take_lease(self, worker: WorkerId, lease: Lease) -> None:
        followed = self.workers.get(worker)
        if followed is not None and _life(followed.lease) == _life(lease):
            changed = followed.lease != lease
            followed.lease = lease
            if followed.missing_since is not None:
                followed.missing_since = None
                self._settle_feed(followed)
            self._check_promise(worker, followed)
        else:
            if followed is not None:
                self._end_snapshot(followed)
            self._index.remove_worker(worker)
            self.workers[worker] = Followed(lease, redis_key(self._cluster, worker, "events").encode())
            changed = True
        if changed and self.on_lease_change is not None:
            self.on_lease_change(worker, lease)

    def _check_promise(self, worker: WorkerId, followed: Followed) -> None:
        """A lease names a state: either we are there, or we must get there."""
        lease = followed.lease
        if followed.seq is not None:
            if followed.seq == lease.seq:
                if followed.seq >= followed.settled and not self._check(worker, followed, lease.digest):
                    self.must_load(followed)
            elif followed.seq < followed.promised and followed.seq == followed.progress:
                self.must_load(followed)  # no progress since it was promised: batches were lost
        followed.promised = lease.seq
        followed.progress = followed.seq

    def _take_batch(self, worker: WorkerId, followed: Followed, batch: EventBatch) -> bool:
        """Apply the batch if it is the next one; False if something is missing or differs."""
        if batch.epoch != followed.lease.epoch or batch.worker != worker or followed.seq is None:
            return False
        if batch.seq <= followed.seq:
            return True
        if batch.seq > followed.seq + 1:
            return False
        self._index.apply(worker, batch.epoch, batch.events)
        followed.seq = batch.seq
        self.counts.batches += 1
        self.counts.blocks += num_keys(batch.events)
        return batch.seq < followed.settled or self._check(worker, followed, batch.digest)

    def _check(self, worker: WorkerId, followed: Followed, digest: int) -> bool:
        """Whether we hold what the worker held at the same batch. A second time in doubt, Redis itself is wrong."""
        if self._index.digest(worker) == digest:
            followed.doubted = False
            return True
        self.counts.mismatches += 1
        if not followed.doubted:
            _log.warning("the index differs from what worker %s holds; it is read again", worker)
        elif followed.ask is not None:
            followed.ask(FeedRequest("republish"))
        else:  # nobody can be asked: do not read the same wrong set all the time
            followed.load_after = self._clock() + _RELOADS_SKIPPED * self._times.reload
        followed.doubted = True
        return False

    def _drop(self, worker: WorkerId) -> None:
        self._end_snapshot(self.workers.pop(worker))
        self._index.remove_worker(worker)
        if self.on_lease_change is not None:
            self.on_lease_change(worker, None)

    def _missed(self, followed: Followed) -> None:
        """The feed has a hole. While Redis answers that is its business."""
        if followed.feeding and self._needs_feed(followed):
            followed.feeding = False
            self._ask_for_feed(followed)

    def _needs_feed(self, followed: Followed) -> bool:
        return self._redis_is_away or followed.missing_since is not None

    def _settle_feed(self, followed: Followed) -> None:
        """Ask for the feed, or for its end."""
        if self._needs_feed(followed):
            self._ask_for_feed(followed)
        elif followed.feeding and followed.ask is not None:
            followed.feeding = False
            followed.ask(FeedRequest("unfollow"))

    def _ask_all(self) -> None:
        for followed in self.workers.values():
            self._settle_feed(followed)

    def _ask_for_feed(self, followed: Followed) -> None:
        now = self._clock()
        if followed.ask is None or followed.feeding or now - followed.asked_at < self._times.reload / 4:
            return
        followed.asked_at = now
        followed.feeding = True
        followed.ask(FeedRequest("follow", followed.seq or 0))

    def _end_snapshot(self, followed: Followed) -> None:
        if followed.loading is not None:
            followed.loading.abandon()
            followed.loading = None


def _decoded(payload: bytes | None) -> EventBatch | None:
    try:
        return None if payload is None else decode(payload)
    except msgspec.MsgspecError:
        return None


def _life(lease: Lease) -> tuple[int, str]:
    """What two lives of a worker differ in."""
    return lease.epoch, lease.life
