"""What routers of the simulated fleet tell each other of their loads, each in its own rhythm, as over Redis.

Knows no worker. Invariant: a router hears what each other one said at a tick before its own last one, never anything
newer; ticks that tell no decision anything are left out, which nobody can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench.simulate.routers import SimulatedRouter
from router.peers import EVERY_S, Loads

_HEARD_AFTER = 2
"""Ticks after a decision that a router learns from what was unheard then."""
_NO_TIME = 1e-9

Act = Callable[[float], None]


class Exchange:
    """Ticks from `start` on, every `EVERY_S`, spread evenly over the routers."""

    def __init__(self, routers: Sequence[SimulatedRouter], start: float) -> None:
        self._routers = routers
        self._start = start
        self._said: list[Loads | None] = [None for _ in routers]
        for router in routers:
            router.peers.unheard.stand((other.name for other in routers), router.name)
        self._asked_for: set[tuple[bool, int, int]] = set()

    def wanted(self, number: int, when: float) -> Iterator[tuple[float, Act]]:
        """What has to be done when, for a router that decides at `when`; nothing that was asked for before."""
        newest = self._tick(number, when)
        for tick in range(max(0, newest), newest + 1 + _HEARD_AFTER):
            heard_at = self._time(number, tick)
            for other in range(len(self._routers)):
                if other != number:
                    yield from self._once(other, self._tick(other, heard_at), hears=False)
            yield from self._once(number, tick, hears=True)

    def _once(self, number: int, tick: int, *, hears: bool) -> Iterator[tuple[float, Act]]:
        if tick >= 0 and (hears, number, tick) not in self._asked_for:
            self._asked_for.add((hears, number, tick))
            yield self._time(number, tick), partial(self._hear if hears else self._say, number)

    def _say(self, number: int, now: float) -> None:
        router = self._routers[number]
        router.now = now
        self._said[number] = router.sent()

    def _hear(self, number: int, now: float) -> None:
        router = self._routers[number]
        router.now = now
        router.peers.take([loads for other, loads in enumerate(self._said) if other != number and loads is not None])

    def _tick(self, number: int, when: float) -> int:
        """A router's last one; below 0 before its first."""
        return math.floor((when - self._time(number, 0)) / EVERY_S + _NO_TIME)

    def _time(self, number: int, tick: int) -> float:
        return self._start + number * EVERY_S / len(self._routers) + tick * EVERY_S
