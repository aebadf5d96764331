"""Blocks that one worker gets from another: who may give to whom, what is under way, and what it takes, measured.

Knows no prompt and no link; whoever measures says when. Invariant: what was not seen for long is as if never measured,
so that neither a worker nor the way itself is given up for good.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from router.columns import PullRates, Sources
from router.plans import Pull

FIRST_START_S = 0.05
FIRST_SHARE = 0.5
"""Until pulls are measured, each takes so long and a token this share of one that is computed: they are tried where
there is much to gain."""
FADE_S = 300.0
FIT_S = 1.0
TIMEOUT_FACTOR = 3.0
LEAST_TIMEOUT_S, MOST_TIMEOUT_S = 0.25, 10.0


def timeout_s(pull: Pull) -> float:
    """When to wait for a pull no longer: when it takes some times what it should, or as long as to compute instead.

    So a pull that fails costs no more than twice what was to be saved, even where nothing was measured.
    """
    return min(MOST_TIMEOUT_S, max(LEAST_TIMEOUT_S, min(TIMEOUT_FACTOR * pull.seconds, pull.compute_s)))


class PullMeter:
    """Fits `seconds = start + tokens * s_per_token` to the pulls of late, with errors relative to what was measured.

    Two made-up pulls by the first guess stay among them: with none but equal ones there would be no line.
    """

    _FAR, _WEIGHT = 4096.0, 0.25

    def __init__(self) -> None:
        self._sums: tuple[float, ...] = (0.0,) * 5  # of w, w x, w y, w x x, w x y
        self._at = 0.0
        self._fitted: tuple[float, float, PullRates] | None = None  # for these seconds a token, at this time

    def add(self, tokens: float, seconds: float, now: float) -> None:
        """So many tokens came in so long, each counted once more for each other pull from the same worker."""
        faded = math.exp((self._at - now) / FADE_S)
        added = _sample(tokens, max(seconds, 1e-4))
        self._sums = tuple(one * faded + other for one, other in zip(self._sums, added, strict=True))
        self._at = now
        self._fitted = None

    def rates(self, compute_s_per_token: float, now: float) -> PullRates:
        """As it is now or was up to `FIT_S` ago, where to compute a token takes so long."""
        if self._fitted is None or self._fitted[0] != compute_s_per_token or not 0 <= now - self._fitted[1] < FIT_S:
            self._fitted = compute_s_per_token, now, self._fit(compute_s_per_token, now)
        return self._fitted[2]

    def _fit(self, compute_s_per_token: float, now: float) -> PullRates:
        near = _sample(0.0, FIRST_START_S)
        far = _sample(self._FAR, FIRST_START_S + self._FAR * FIRST_SHARE * compute_s_per_token)
        faded, part = math.exp((self._at - now) / FADE_S), self._WEIGHT
        summed = zip(self._sums, near, far, strict=True)
        w, wx, wy, wxx, wxy = (one * faded + part * (guess + other) for one, guess, other in summed)
        slope = (w * wxy - wx * wy) / (w * wxx - wx * wx)
        start = (wy - slope * wx) / w
        if start < 0:
            return PullRates(0.0, wxy / wxx)
        return PullRates(start, slope) if slope > 0 else PullRates(wy / w, 0.0)


def _sample(x: float, y: float) -> tuple[float, ...]:
    weight = 1.0 / (y * y)
    return weight, weight * x, weight * y, weight * x * x, weight * x * y


class Giver:
    """What one life of a worker gives: `under_way`, and the share that came of what was asked of it."""

    _NEWS = 0.3
    _FADE_S = 60.0

    def __init__(self) -> None:
        self.under_way = 0
        self._missed, self._at = 0.0, 0.0

    def share(self, now: float) -> float:
        """1 for one that was not asked for long."""
        return 1.0 - self._missed * math.exp((self._at - now) / self._FADE_S)

    def gave(self, share: float, now: float) -> None:
        """This much came of what was asked."""
        missed = 1.0 - self.share(now)
        self._missed, self._at = missed + (1.0 - share - missed) * self._NEWS, now


class Givers:
    """All workers as columns, in the rows that somebody else gives them."""

    def __init__(self, size: int) -> None:
        self._formats = [""] * size
        self._pulls, self._shares = np.zeros(size), np.ones(size)
        self._groups: tuple[NDArray[np.intp], ...] | None = ()

    def write(self, row: int, payload_format: str, pulls: int, share: float) -> None:
        """What is known of one; no format: it can be asked for nothing."""
        self._pulls[row], self._shares[row] = pulls, share
        if self._formats[row] != payload_format:
            self._formats[row] = payload_format
            self._groups = None

    def share(self, row: int) -> float:
        """As it was written."""
        return float(self._shares[row])

    @property
    def can_give(self) -> bool:
        """Whether there are two that understand each other."""
        return bool(self.groups)

    @property
    def groups(self) -> tuple[NDArray[np.intp], ...]:
        """Rows that may give to each other."""
        if self._groups is None:
            self._groups = groups_of(self._formats)
        return self._groups

    def sources(self, rates: PullRates) -> Sources:
        """For the cost of a prompt."""
        return Sources(rates, self.groups, self._pulls, self._shares)


def groups_of(formats: list[str]) -> tuple[NDArray[np.intp], ...]:
    """The rows of each payload format that more than one has."""
    names = np.array(formats)
    groups = (np.flatnonzero(names == name) for name in sorted(set(formats) - {""}))
    return tuple(group for group in groups if len(group) > 1)
