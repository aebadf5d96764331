"""What one life of a worker holds, as it tells others: changes in numbered batches, with a digest of the whole.

Knows no Redis and no link. Invariant: batch n is what leads from the state after n - 1 to the state whose digest it
carries; the newest batches are kept, so that who missed a few need not be told everything. For one thread.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from kvstore.events import (
    CPU,
    DEVICE,
    BlocksRemoved,
    BlocksStored,
    Cleared,
    Event,
    EventBatch,
    TierChanged,
    encode,
    keys_sum,
    num_keys,
    state_digest,
)

KEYS_PER_BATCH = 4096
"""What one script call at Redis, or one turn of a router, takes at once."""


@dataclass(frozen=True, slots=True)
class Position:
    """A state: the number of the batch that led to it, resident blocks of both tiers, and their digest."""

    seq: int = 0
    num_blocks: int = 0
    digest: int = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """One batch, encoded, and the state after it."""

    position: Position
    events: Sequence[Event]
    payload: bytes


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """A part of all that is resident at `position`; keys of 16 bytes, one after the other."""

    position: Position
    tier: int
    keys: bytes
    is_first: bool
    is_last: bool


Told: TypeAlias = list[bytes] | SnapshotPart
"""What a listener hears: encoded batches, or a part of a snapshot."""

Listener: TypeAlias = Callable[[Told], object]


class Ledger:
    """`kept_keys` bounds the batches that are kept, by the keys in them."""

    def __init__(self, worker_id: str, epoch: int, *, kept_keys: int = 65_536, kept_batches: int = 4096) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.position = Position()
        self._resident: tuple[set[bytes], set[bytes]] = (set(), set())
        self._sums = [0, 0]
        self._listeners: list[Listener] = []
        self._kept: deque[Recorded] = deque()
        self._num_kept_keys = 0
        self._limits = kept_batches, kept_keys

    def record(self, events: Sequence[Event]) -> list[Recorded]:
        """Take in what changed, in as many batches as it needs; none for no change."""
        return [self._number(part) for part in _split(events)]

    def mark(self) -> Recorded:
        """A batch that changes nothing: the state has a new number."""
        return self._number([])

    def since(self, seq: int) -> list[Recorded] | None:
        """All batches after number `seq`; None if they are not all kept, or `seq` is none of ours."""
        missing = self.position.seq - seq
        if not 0 <= missing <= len(self._kept):
            return None
        return list(itertools.islice(self._kept, len(self._kept) - missing, None))

    def follow(self, listener: Listener, seq: int) -> None:
        """From now on `listener` hears every batch after number `seq`; where those are not all kept, or `seq` is 0, a
        snapshot comes first."""
        self.unfollow(listener)
        missing = self.since(seq) if seq else None
        if missing is None:
            for part in self.snapshot():
                listener(part)
        elif missing:
            listener([recorded.payload for recorded in missing])
        self._listeners.append(listener)

    def unfollow(self, listener: Listener) -> None:
        """It hears no more. Idempotent."""
        if listener in self._listeners:
            self._listeners.remove(listener)

    def keys(self, tier: int) -> Iterator[bytes]:
        """The resident keys of a tier, in any order."""
        return iter(self._resident[tier])

    def snapshot(self, num_keys: int = 8 * KEYS_PER_BATCH) -> list[SnapshotPart]:
        """All that is resident."""
        parts: list[tuple[int, bytes]] = []
        for tier in (DEVICE, CPU):
            keys = self.keys(tier)
            while chunk := b"".join(itertools.islice(keys, num_keys)):
                parts.append((tier, chunk))
        parts = parts or [(DEVICE, b"")]
        last = len(parts) - 1
        return [SnapshotPart(self.position, tier, chunk, at == 0, at == last) for at, (tier, chunk) in enumerate(parts)]

    def _number(self, events: list[Event]) -> Recorded:
        self._fold(events)
        seq = self.position.seq + 1
        self.position = Position(seq, sum(map(len, self._resident)), state_digest(*self._sums))
        payload = encode(EventBatch(self.worker_id, self.epoch, seq, events, self.position.digest))
        recorded = Recorded(self.position, events, payload)
        self._keep(recorded)
        for listener in self._listeners:
            listener([payload])
        return recorded

    def _keep(self, recorded: Recorded) -> None:
        most_batches, most_keys = self._limits
        self._kept.append(recorded)
        self._num_kept_keys += num_keys(recorded.events)
        while len(self._kept) > most_batches or self._num_kept_keys > most_keys:
            self._num_kept_keys -= num_keys(self._kept.popleft().events)

    def _fold(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, BlocksStored):
                self._store(event.tier, event.keys)
            elif isinstance(event, BlocksRemoved):
                self._remove(event.tier, event.keys)
            elif isinstance(event, TierChanged):
                self._store(event.tier, event.keys)
                self._remove(CPU if event.tier == DEVICE else DEVICE, event.keys)
            else:
                for tier in (DEVICE, CPU):
                    self._resident[tier].clear()
                    self._sums[tier] = 0

    def _store(self, tier: int, keys: Iterable[bytes]) -> None:
        fresh = set(keys) - self._resident[tier]
        self._resident[tier].update(fresh)
        self._sums[tier] += keys_sum(fresh)

    def _remove(self, tier: int, keys: Iterable[bytes]) -> None:
        gone = self._resident[tier].intersection(keys)
        self._resident[tier].difference_update(gone)
        self._sums[tier] -= keys_sum(gone)


def _split(events: Sequence[Event]) -> Iterable[list[Event]]:
    """The events in batches of a bounded number of keys."""
    batch: list[Event] = []
    room = KEYS_PER_BATCH
    for event in events:
        if isinstance(event, Cleared):
            batch.append(event)
            continue
        for first in range(0, len(event.keys), KEYS_PER_BATCH):
            part = msgspec.structs.replace(event, keys=event.keys[first : first + KEYS_PER_BATCH])
            if len(part.keys) > room:
                yield batch
                batch, room = [], KEYS_PER_BATCH
            batch.append(part)
            room -= len(part.keys)
    if batch:
        yield batch
