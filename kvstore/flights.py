"""Single flight: which block is being computed or loaded by whom, so that others wait for it instead of doing it too.

Knows tables by their flights only. Invariant: a flight is led by a sequence that holds blocks and waits for nobody;
who waits holds nothing. So there is no cycle, and a leader that goes away wakes all who wait.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.block import BlockKey
from kvstore.scope import Region, ScopeRoot


class Flight:
    """One leader's way through its tokens. `next_key` names what it will seal next, a block or a published end."""

    __slots__ = ("data", "ended", "next_key", "num_found", "parent", "regions", "root")

    def __init__(self, regions: Sequence[Region], data: bytes) -> None:
        self.regions = regions
        self.data = data
        """All token ids that the leader goes through, little-endian u32."""
        self.next_key: BlockKey | None = None
        self.root: ScopeRoot | None = None
        self.parent = 0
        self.num_found = 0
        """Tokens that others find, sealed by the leader or before it."""
        self.ended = False


class Wait:
    """What a follower waits for: that so many tokens of its own are found, or that the leader is gone."""

    __slots__ = ("_flight", "num_tokens")

    def __init__(self, flight: Flight, num_tokens: int) -> None:
        self._flight = flight
        self.num_tokens = num_tokens

    @property
    def ready(self) -> bool:
        """Whether another try is worth it: more is cached now, or the next one has to lead."""
        return self._flight.ended or self._flight.num_found >= self.num_tokens


class Flights:
    """The flights of one pool by what each seals next."""

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

    def advance(self, flight: Flight, num_found: int, key: BlockKey, root: ScopeRoot, parent: int) -> None:
        """The leader is past so many tokens and goes on with this block, unless somebody else is at it already."""
        self._leave(flight)
        flight.num_found = num_found
        flight.root, flight.parent = root, parent
        if self._by_key.setdefault(key, flight) is flight:
            flight.next_key = key

    def end(self, flight: Flight, num_found: int) -> None:
        """The leader seals no more."""
        self._leave(flight)
        flight.num_found = num_found
        flight.ended = True

    def _leave(self, flight: Flight) -> None:
        if flight.next_key is not None:
            del self._by_key[flight.next_key]
            flight.next_key = None
