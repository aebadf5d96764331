"""What routers of the simulated fleet tell each other of their loads, each in its own rhythm, as over Redis.

Knows no worker. Invariant: a router hears what each other one said at a tick before its own last one, never anything
newer; ticks that no request will ask for are left out, which nobody can tell.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

from bench.simulate.routers import SimulatedRouter
from router.peers import EVERY_S, Loads

_KEPT = 8
_NO_TIME = 1e-9


class Exchange:
    """Ticks from `start` on, every `EVERY_S`, spread evenly over the routers."""

    def __init__(self, routers: Sequence[SimulatedRouter], start: float) -> None:
        self._routers = routers
        self._start = start
        self._said = [deque[tuple[float, Loads]](maxlen=_KEPT) for _ in routers]

    def wanted(self, number: int, when: float) -> Iterator[tuple[float, int]]:
        """When who has to `say` something, for a router to `hear` at `when`."""
        asked_at = self._tick(number, when)
        for other in range(len(self._routers)):
            said_at = self._tick(other, asked_at)
            if other != number and said_at >= self._start:
                yield said_at, other

    def say(self, number: int, now: float) -> None:
        """A router's tick."""
        router = self._routers[number]
        router.now = now
        self._said[number].append((now, router.sent()))

    def hear(self, number: int, now: float) -> None:
        """Tell a router what it heard at its last tick."""
        asked_at = self._tick(number, now) + _NO_TIME
        others = (said for other, said in enumerate(self._said) if other != number)
        newest = (next((loads for at, loads in reversed(said) if at <= asked_at), None) for said in others)
        self._routers[number].peers.take(loads for loads in newest if loads is not None)

    def _tick(self, number: int, now: float) -> float:
        first = self._start + number * EVERY_S / len(self._routers)
        return first + math.floor((now - first) / EVERY_S + _NO_TIME) * EVERY_S
