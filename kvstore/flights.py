"""Single flight: which block is being computed or loaded by whom, so that others wait for it instead of doing it too.

Knows tables by their flights only. Invariant: a flight is led by a sequence that holds blocks and waits for nobody;
who waits holds nothing. So there is no cycle, and a leader that goes away wakes all who wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.block import BlockKey
from kvstore.scope import Region, ScopeRoot


class Flight:
    """One leader's way through its tokens. `next_key` names the block it will seal next."""

    __slots__ = ("data", "ended", "next_key", "parent", "regions", "root", "sealed")

    def __init__(self, regions: Sequence[Region], data: bytes) -> None:
        self.regions = regions
        self.data = data
        """All token ids that the leader goes through, little-endian u32."""
        self.next_key: BlockKey | None = None
        self.root: ScopeRoot | None = None
        self.parent = 0
        self.sealed = 0
        self.ended = False


class Wait:
    """What a follower waits for: that the leader has sealed so many blocks, or is gone."""

    __slots__ = ("_flight", "num_blocks")

    def __init__(self, flight: Flight, num_blocks: int) -> None:
        self._flight = flight
        self.num_blocks = num_blocks

    @property
    def ready(self) -> bool:
        """Whether another try is worth it: more is cached now, or the next one has to lead."""
        return self._flight.ended or self._flight.sealed >= self.num_blocks


class Flights:
    """The flights of one pool by the key of the next block of each."""

    __slots__ = ("_by_key",)

    def __init__(self) -> None:
        self._by_key: dict[BlockKey, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, key: BlockKey, root: ScopeRoot, parent: int) -> Flight | None:
        """The flight whose next block has this key, scope and parent content. Its tokens are not compared."""
        flight = self._by_key.get(key)
        if flight is None or flight.root != root or flight.parent != parent:
            return None
        return flight

    def advance(self, flight: Flight, sealed: int, key: BlockKey, root: ScopeRoot, parent: int) -> None:
        """The leader has sealed so many blocks and goes on with this one, unless somebody else is at it already."""
        self._leave(flight)
        flight.sealed = sealed
        flight.root, flight.parent = root, parent
        if self._by_key.setdefault(key, flight) is flight:
            flight.next_key = key

    def end(self, flight: Flight, sealed: int) -> None:
        """The leader seals no more."""
        self._leave(flight)
        flight.sealed = sealed
        flight.ended = True

    def _leave(self, flight: Flight) -> None:
        if flight.next_key is not None:
            del self._by_key[flight.next_key]
            flight.next_key = None
