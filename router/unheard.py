"""What other routers place at the very moment that this one does: how much, of late, and where it must be expected.

Knows no request and no clock. Invariant: who never hears of others expects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.rates import Mean

Floats = NDArray[np.float64]

_WEIGHT = 0.05
_LIKELY = 0.5
_ALIKE = 1e-9


@dataclass(frozen=True, slots=True)
class Others:
    """What to expect of the other routers at the moment of a decision: so many prompt `tokens` placed by them together.

    `rank` is this router's among `routers`, by name: all count alike without talking.
    """

    tokens: float
    rank: int
    routers: int

    def part(self, weights: Floats) -> NDArray[np.bool_]:
        """The rows to choose from here, where a router chooses by itself and none must follow the others.

        `weights`, not negative, are laid out in the order of rows and cut in `routers` equal parts, of which each
        router takes its own; of the rows in it those which fill most of it. So all together choose each row as often
        as its weight says, and no two routers the same one while there are enough.
        """
        ends = weights.cumsum()
        share = ends[-1] / self.routers
        begin = self.rank * share
        inside = np.minimum(ends, begin + share) - np.maximum(ends - weights, begin)
        return np.asarray(inside >= inside.max() - _ALIKE * share)


class Unheard:
    """Prompt tokens that others place while neither they know of a decision here nor this router of theirs.

    Measured at decisions, not over time: what matters of bursts that reach several routers at once is their size, and
    not how long nothing came before.
    """

    def __init__(self) -> None:
        self._tokens = Mean(0.0, _WEIGHT)
        self._any = Mean(0.0, _WEIGHT)
        self._decisions, self._earlier = 0, 0
        self._rank, self._routers = 0, 1

    @property
    def others(self) -> Others | None:
        """To expect at a decision; None where more often than not there was nothing.

        Who is likely alone does best as if alone: to stand back for others that do not come costs time and hits.
        """
        return Others(self._tokens.value, self._rank, self._routers) if self._any.value > _LIKELY else None

    def stand(self, names: Iterable[str], own: str) -> None:
        """These are the routers of the fleet, in any order."""
        names = sorted({*names, own})
        self._rank, self._routers = names.index(own), len(names)

    def decide(self) -> None:
        """This router has placed a request."""
        self._decisions += 1

    def hear(self, fresh_tokens: int) -> None:
        """The others said what they placed lately: the second time after a decision that is what was unheard then.

        What they say the first time may be from before it.
        """
        for _ in range(self._earlier):
            self._tokens.add(fresh_tokens)
            self._any.add(float(fresh_tokens > 0))
        self._decisions, self._earlier = 0, self._decisions


def expected(ready_s: Floats, s_per_token: Floats, tokens: float) -> Floats:
    """By worker, where `tokens` go that are placed one after the other, each where least is ahead of it.

    `ready_s`: when each would begin with the first of them, infinite where none can go. All that get some end alike.
    """
    order = ready_s.argsort()
    ready, per_s = ready_s[order], 1.0 / s_per_token[order]
    # Were the first one, two, ... filled to one level, it would be at these; the lowest is where there is no next one.
    level = float(np.fmin.reduce((tokens + (ready * per_s).cumsum()) / per_s.cumsum()))
    return np.maximum(level - ready_s, 0.0) / s_per_token
