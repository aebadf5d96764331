"""How likely the blocks that a worker would evict next are to be asked for again: a ghost of each worker's LRU order.

Follows a sample of the keys that pass, never a block itself. Invariant: bounded, by the workers' capacities and by
`MOST_KEYS`; the sample is chosen by key alone, so a key is followed everywhere or nowhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from kvstore.block import BlockKey, WorkerId

SAMPLE = 32
"""Of 256 keys so many are followed."""
MOST_KEYS = 1 << 16
_BELOW = bytes([SAMPLE])
_BUCKETS = 48
_FIRST_S = 0.25
_FADE_AFTER = 1 << 15
_ENOUGH = 16


class Ghost:
    """What was placed where, by sampled keys: what is idle for how long, and how long keys are idle before a reuse."""

    def __init__(self) -> None:
        self._orders: dict[WorkerId, OrderedDict[BlockKey, float]] = {}
        self._capacity: dict[WorkerId, int] = {}
        self._last: OrderedDict[BlockKey, float] = OrderedDict()
        # Of all times that keys were used: how many there were, and after how long some were used again.
        self._uses = 0.0
        self._reuses = [0.0] * _BUCKETS

    def resize(self, worker: WorkerId, num_blocks: int) -> None:
        """A worker has room for so many blocks; it is followed from now on."""
        self._capacity[worker] = max(1, num_blocks * SAMPLE // 256)
        self._orders.setdefault(worker, OrderedDict())

    def drop(self, worker: WorkerId) -> None:
        """A worker is gone, or has begun a new life."""
        self._orders.pop(worker, None)
        self._capacity.pop(worker, None)

    def placed(self, worker: WorkerId, keys: Sequence[BlockKey], now: float) -> None:
        """A prompt with these keys went to a worker, which now has them, the last one the least recently used."""
        order = self._orders.get(worker)
        if order is None:
            return
        sample = [key for key in keys if key[:1] < _BELOW]
        for key in reversed(sample):
            order[key] = now
            order.move_to_end(key)
        while len(order) > self._capacity[worker]:
            order.popitem(last=False)
        self._count(sample, now)

    def reuse(self, worker: WorkerId, now: float) -> float:
        """Probability that the block which the worker evicts next is asked for again; 0 while it has room.

        Of keys that were idle for as long: those used again later among those used again later or never.
        """
        order = self._orders.get(worker)
        if not order or len(order) < self._capacity[worker]:
            return 0.0
        idle_s = now - next(iter(order.values()))
        bucket = _bucket(idle_s)
        half = self._reuses[bucket] / 2
        later = sum(self._reuses[bucket + 1 :]) + half
        idle = self._uses - sum(self._reuses[:bucket]) - half
        # While nothing is known, what is kept is taken to be worth keeping.
        return min(1.0, later / idle) if idle > _ENOUGH else 1.0

    def _count(self, sample: Sequence[BlockKey], now: float) -> None:
        last, reuses = self._last, self._reuses
        for key in sample:
            before = last.pop(key, None)
            if before is not None:
                reuses[_bucket(now - before)] += 1
            last[key] = now
        self._uses += len(sample)
        while len(last) > MOST_KEYS:
            last.popitem(last=False)
        if self._uses > _FADE_AFTER:
            self._uses /= 2
            self._reuses = [count / 2 for count in reuses]


def _bucket(seconds: float) -> int:
    """Two for each doubling."""
    if seconds <= _FIRST_S:
        return 0
    return min(_BUCKETS - 1, int(2 * math.log2(seconds / _FIRST_S)) + 1)
