"""Tells Redis what this worker holds and that it lives, and routers that ask for it, from a thread of its own.

Knows no gRPC and never touches the pool: events and load come through a queue. Redis may be gone at any time; what it
missed is made good at a later heartbeat. A newer life of the worker stops this one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue

import msgspec
import redis

from kvstore.block import BlockKey
from kvstore.events import BlocksStored, Cleared, Event
from kvstore.lease import Fenced, Lease, LeaseKeeper
from kvstore.ledger import Listener
from kvstore.redis_index import RedisIndexWriter
from worker.engine import Load, StepReport

logger = logging.getLogger(__name__)


REPUBLISH_EVERY_S = 5.0
START_TRIES = 20


class Publisher:
    """`put` may be called from any thread; all of Redis is this thread's, once `start` has returned.

    `planted` are the keys that routers look for, published beside what the worker holds.
    """

    def __init__(
        self,
        index: RedisIndexWriter,
        keeper: LeaseKeeper,
        lease: Lease,
        *,
        heartbeat_s: float,
        on_fenced: Callable[[], None],
        planted: Sequence[BlockKey] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._keeper = keeper
        self._lease = lease
        self._planted: list[bytes] = list(planted)
        self._heartbeat_s = heartbeat_s
        self._on_fenced = on_fenced
        self._clock = clock
        self._queue: SimpleQueue[tuple[list[Event], Load | None] | Callable[[], None] | None] = SimpleQueue()
        self._republish_after = 0.0
        self._load: Load | None = None
        self._reachable = True
        self._next_beat = clock()
        self._thread = threading.Thread(target=self._live, name="publisher", daemon=True)

    def start(self) -> None:
        """Publish the lease and an empty set, then go on in the background. Raises `redis.RedisError` or `Fenced`."""
        self._register()
        self._index.publish([BlocksStored(self._planted)])
        self._index.repair()
        self._next_beat = self._clock() + self._heartbeat_s
        self._thread.start()

    def put(self, report: StepReport) -> None:
        """Take over what a step changed."""
        if report.events or report.load is not None:
            self._queue.put((report.events, report.load))

    def follow(self, listener: Listener, seq: int) -> None:
        """As `Ledger.follow`; `listener` is called on the publisher's thread and must not wait."""
        self._queue.put(partial(self._index.ledger.follow, listener, seq))

    def unfollow(self, listener: Listener) -> None:
        """It hears no more. Idempotent."""
        self._queue.put(partial(self._index.ledger.unfollow, listener))

    def republish(self) -> None:
        """A router found that what Redis holds of this worker is wrong: write it anew, soon."""
        self._queue.put(self._doubt)

    def stop(self) -> None:
        """Publish what is left, give the lease back and end the thread. Idempotent."""
        self._queue.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _register(self) -> None:
        """The first lease; a machine that is busy with starting may need more than one try."""
        for left in reversed(range(START_TRIES)):
            try:
                return self._keeper.renew(self._lease)
            except redis.RedisError:
                if not left:
                    raise

    def _live(self) -> None:
        try:
            while self._round():
                pass
            self._give_back()
        except Fenced as error:
            logger.warning("%s; it stops", error)
            self._on_fenced()

    def _round(self) -> bool:
        """Sleep until there is something to do and do it; False when the thread should end."""
        events, going_on = self._wait_for_events()
        was_in_sync = self._index.in_sync
        if events and not self._publish(events) and was_in_sync:
            self._next_beat = self._clock()  # Redis may be there and have lost its state: find out now
        if self._clock() >= self._next_beat:
            self._beat()
            self._next_beat = self._clock() + self._heartbeat_s
        return going_on

    def _wait_for_events(self) -> tuple[list[Event], bool]:
        """All events that wait, in order: several steps in one batch when Redis is slower than the engine."""
        events: list[Event] = []
        timeout = max(0.0, self._next_beat - self._clock())
        try:
            item = self._queue.get(timeout=timeout)
            while item is not None:
                if callable(item):
                    self._publish(events)
                    events = []
                    item()
                else:
                    events += item[0]
                    self._load = item[1] or self._load
                item = self._queue.get_nowait()
        except Empty:
            return events, True
        return events, False

    def _doubt(self) -> None:
        """Rarely: a router that is wrong itself must not keep Redis busy."""
        now = self._clock()
        if now >= self._republish_after:
            self._republish_after = now + REPUBLISH_EVERY_S
            logger.warning("a router says that the index differs from what this worker holds; it is written anew")
            self._index.publish_snapshot(self._renew_if_due)

    def _publish(self, events: list[Event]) -> bool:
        if any(isinstance(event, Cleared) for event in events):
            events = [*events, BlocksStored(self._planted)]
        return self._index.publish(events)

    def _beat(self) -> None:
        """Renew the lease and bring the index up to date, if Redis is there."""
        before = self._index.acknowledged
        reachable = self._renew() and self._index.repair(self._renew_if_due)
        if reachable and self._index.acknowledged != before:
            self._renew()
        if reachable != self._reachable:
            self._reachable = reachable
            logger.warning("Redis is %s", "back" if reachable else "gone; serving goes on")

    def _renew(self) -> bool:
        try:
            self._keeper.renew(self._present())
        except redis.RedisError:
            return False
        return True

    def _renew_if_due(self) -> None:
        """Within long work: the lease must not end meanwhile."""
        if self._clock() >= self._next_beat:
            self._renew()
            self._next_beat = self._clock() + self._heartbeat_s

    def _present(self) -> Lease:
        """The lease as it should read now."""
        at = self._index.acknowledged
        lease = msgspec.structs.replace(self._lease, seq=at.seq, num_blocks=at.num_blocks, digest=at.digest)
        load = self._load
        if load is None:
            return lease
        return msgspec.structs.replace(
            lease,
            running=load.running,
            waiting=load.waiting,
            queued_tokens=load.queued_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            draining=load.draining,
        )

    def _give_back(self) -> None:
        try:
            self._keeper.release(self._lease.worker_id, self._lease.epoch)
        except redis.RedisError:
            logger.info("Redis is gone; the lease ends by itself")
