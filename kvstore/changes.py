"""The net change of a tier's sealed set between two looks.

Knows keys only. Invariant: it is as large as the set at most, however rarely it is taken.
"""

from __future__ import annotations

from kvstore.events import BlocksRemoved, BlocksStored, Cleared, Event


class Changes:
    """Keys stored and removed in `tier` since the last `take`."""

    __slots__ = ("_cleared", "_removed", "_stored", "_tier")

    def __init__(self, tier: int) -> None:
        self._tier = tier
        self._cleared = False
        self._removed: dict[bytes, None] = {}
        self._stored: dict[bytes, None] = {}

    def stored(self, key: bytes) -> None:
        """The key came."""
        if key in self._removed:
            del self._removed[key]
        else:
            self._stored[key] = None

    def removed(self, key: bytes) -> None:
        """The key went."""
        if key in self._stored:
            del self._stored[key]
        else:
            self._removed[key] = None

    def cleared(self) -> None:
        """No key is left in any tier."""
        self._cleared = True
        self._removed.clear()
        self._stored.clear()

    def take(self) -> list[Event]:
        """At most one event of each kind."""
        events: list[Event] = []
        if self._cleared:
            events.append(Cleared())
        if self._removed:
            events.append(BlocksRemoved(list(self._removed), self._tier))
        if self._stored:
            events.append(BlocksStored(list(self._stored), self._tier))
        self._cleared = False
        self._removed, self._stored = {}, {}
        return events
