"""Prompts that are being computed, or were a moment ago: credit for siblings before the first event tells of a block.

Knows no load and decides nothing. Invariant: each key counts for as long as a request that computes it, so that one of
two siblings may leave and the credit stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Collection, Sequence

from kvstore.block import BlockKey, WorkerId

EVENT_LAG_S = 2.0
"""Longest time to credit a finished prompt before the worker's events must have told of it."""


class Chain:
    """A prompt that is computed: its keys, the first `start` of which were there before."""

    __slots__ = ("keys", "start")

    def __init__(self, keys: Sequence[BlockKey], start: int) -> None:
        self.keys = keys
        self.start = start


class Heads:
    """By its first block, who computes a prompt: whose `Computing` is worth asking. One for all workers."""

    def __init__(self) -> None:
        self._computing: dict[BlockKey, Counter[Computing]] = {}
        self._finished: deque[tuple[float, Computing, Chain]] = deque()

    def of(self, keys: Sequence[BlockKey]) -> Collection[Computing]:
        """Of those that compute a prompt with the same first block, or did a moment ago."""
        return self._computing.get(keys[0], ()) if keys else ()

    def expire(self, now: float) -> None:
        """Forget what events must have told of."""
        while self._finished and self._finished[0][0] <= now:
            _, computing, chain = self._finished.popleft()
            computing.forget(chain)

    def add(self, computing: Computing, chain: Chain) -> None:
        """One more."""
        self._computing.setdefault(chain.keys[0], Counter())[computing] += 1

    def remove(self, computing: Computing, chain: Chain) -> None:
        """One less."""
        head = chain.keys[0]
        counts = self._computing[head]
        counts[computing] -= 1
        if not counts[computing]:
            del counts[computing]
            if not counts:
                del self._computing[head]

    def finish(self, computing: Computing, chain: Chain, now: float) -> None:
        """It has run: it is credited a while longer."""
        self._finished.append((now + EVENT_LAG_S, computing, chain))


class Computing:
    """What one life of a worker computes."""

    def __init__(self, worker: WorkerId, heads: Heads) -> None:
        self.worker = worker
        self._heads = heads
        self._counts: Counter[BlockKey] = Counter()

    def begin(self, keys: Sequence[BlockKey], start: int) -> Chain | None:
        """Credit `keys[start:]` from now on; None where that is nothing."""
        if start >= len(keys):
            return None
        chain = Chain(keys, start)
        self._counts.update(keys[start:])
        self._heads.add(self, chain)
        return chain

    def end(self, chain: Chain, has_run: bool, now: float) -> None:
        """It is over. What has run stays credited until events must have come."""
        if has_run:
            self._heads.finish(self, chain, now)
        else:
            self.forget(chain)

    def depth(self, keys: Sequence[BlockKey], depth: int, most: int) -> int:
        """How many blocks of a prompt are there or will be, `depth` of them being there; without a key none."""
        counts, most = self._counts, min(most, len(keys))
        if depth >= most or keys[depth] not in counts:
            return depth
        # What is computed of a prompt has no holes, so its end is a binary search.
        return bisect_left(range(most), True, depth + 1, key=lambda block: keys[block] not in counts)

    def forget(self, chain: Chain) -> None:
        """Credit it no more."""
        counts = self._counts
        for key in chain.keys[chain.start :]:
            left = counts[key] - 1
            if left:
                counts[key] = left
            else:
                del counts[key]
        self._heads.remove(self, chain)
