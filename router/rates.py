"""Rates that placement goes by, measured as requests pass: seconds a token, by length, of late, and how far to believe.

Knows no request and no clock: whoever measures says when. Invariant: what was never measured has a neutral value, so
that a new worker is neither feared nor preferred.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RATE_NOISE = 0.25
"""Measured rates this near to the fleet's mean count as equal: else noise decides where all cold prompts go."""
UNMEASURED_PREFILL_TOKENS_PER_S = 2000.0


def seconds_per_token(rates: Floats) -> Floats:
    """Of each worker's prefill, from its measured tokens a second (0: unmeasured, taken from its peers)."""
    measured = rates[rates > 0]
    # Sorted, so that the order of workers does not show in the last bit of the mean.
    typical = float(np.sort(measured).mean()) if len(measured) else UNMEASURED_PREFILL_TOKENS_PER_S
    own = (rates > 0) & (np.abs(rates - typical) > RATE_NOISE * typical)
    return 1.0 / np.where(own, rates, typical)


class Mean:
    """An average that forgets: each sample weighs `weight`, the first ones as in a plain mean."""

    __slots__ = ("_count", "value", "weight")

    def __init__(self, value: float, weight: float = 0.1) -> None:
        """`value` holds until the first sample."""
        self.value = value
        self.weight = weight
        self._count = 0

    @property
    def is_measured(self) -> bool:
        return self._count > 0

    def add(self, sample: float) -> None:
        self._count += 1
        self.value += (sample - self.value) * max(self.weight, 1.0 / self._count)


class LengthRates:
    """How much longer than a worker's average a token takes, by the length of the prompt: of the whole fleet.

    All workers serve one model, so the length acts alike on each; what differs is their speed, which they report.
    """

    _FIRST, _BUCKETS = 8, 10  # prompts below 2^8 tokens, then one for each power of two
    _ENOUGH = 8
    _MOST = 4.0

    def __init__(self) -> None:
        self._factors = [Mean(1.0, 0.05) for _ in range(self._BUCKETS)]
        self._seen = [0] * self._BUCKETS

    def factor(self, num_tokens: int) -> float:
        """1 until a few prompts of about this length have been seen."""
        bucket = self._bucket(num_tokens)
        return self._factors[bucket].value if self._seen[bucket] >= self._ENOUGH else 1.0

    def learn(self, num_tokens: int, measured_s: float, average_s: float) -> None:
        """A prompt took `measured_s` to compute, which at its worker's average rate takes `average_s`."""
        bucket = self._bucket(num_tokens)
        self._seen[bucket] += 1
        self._factors[bucket].add(min(self._MOST, max(1 / self._MOST, measured_s / average_s)))

    def _bucket(self, num_tokens: int) -> int:
        return min(self._BUCKETS - 1, max(0, num_tokens.bit_length() - self._FIRST))


class Meters:
    """For each of some workers, how much of something there was a second, of late: one column.

    Old amounts fade with `fade_s`. Kept swollen instead of shrunk, so that time passing touches nothing.
    """

    _MOST = 50.0  # e^50 leaves room in a float

    def __init__(self, size: int, began: float, fade_s: float = 60.0) -> None:
        self._column = np.zeros(size)
        self._fade_s = fade_s
        self._began = self._from = began

    def add(self, row: int, amount: float, now: float) -> None:
        swell = (now - self._from) / self._fade_s
        if swell > self._MOST:
            self._column *= math.exp(-swell)
            self._from, swell = now, 0.0
        self._column[row] += amount * math.exp(swell)

    def per_second(self, now: float) -> Floats:
        """All rows; zeros in the first second."""
        if now - self._began < 1.0:
            return np.zeros_like(self._column)
        seconds = self._fade_s * -math.expm1((self._began - now) / self._fade_s)
        rates: Floats = self._column * (math.exp((self._from - now) / self._fade_s) / seconds)
        return rates

    def moved(self, rows: list[int | None]) -> Meters:
        """The same of other rows: where each was; None for a new one, which begins at the mean of the others."""
        kept = [row for row in rows if row is not None]
        mean = float(self._column[kept].mean()) if kept else 0.0
        other = Meters(len(rows), self._began, self._fade_s)
        other._from = self._from
        other._column[:] = [mean if row is None else self._column[row] for row in rows]
        return other
