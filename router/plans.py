"""The cheapest way to have a prompt's KV at each worker: compute it, wait for who computes it, load it, or pull it.

Works on columns, as `cost` does. Invariant: a worker's plan depends on its own row alone, but for the source of a pull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvstore.block import WorkerId
from router.columns import Columns, Floats, Held, Prompt, Sources

Plan = Literal["recompute", "wait", "load", "pull"]
PLANS: tuple[Plan, ...] = ("recompute", "wait", "load", "pull")
_WAIT, _LOAD, PULL = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Pull:
    """Blocks to fetch first: `source` is believed to have the first `num_tokens` of the prompt, and to send those that
    are missing in `seconds`, beside `others` that it sends. To compute those instead takes `compute_s`."""

    source: WorkerId
    num_tokens: int
    seconds: float
    others: float
    compute_s: float


@dataclass(frozen=True, slots=True)
class Plans:
    """For each worker its cheapest plan, the prefix that is not computed, how much of it will be found, and seconds."""

    plan: NDArray[np.int8]
    cached: Floats
    expected: Floats
    seconds: Floats

    def or_better(self, code: int, prefix: Floats | float, expects: Floats, seconds: Floats) -> Plans | None:
        """With another plan where that is faster and saves more; None where it is nowhere."""
        better = (prefix > self.cached) & (seconds < self.seconds)
        if not better.any():
            return None
        return Plans(
            np.where(better, np.int8(code), self.plan),
            np.where(better, prefix, self.cached),
            np.where(better, expects, self.expected),
            np.where(better, seconds, self.seconds),
        )


def cheapest(prompt: Prompt, rows: Columns, held: Held, s_per_token: Floats) -> Plans:
    """Without pulls."""
    found = held.device * rows.confidence
    plans = Plans(np.zeros(len(found), np.int8), held.device, found, (prompt.num_tokens - found) * s_per_token)
    if held.computing is not None:
        # What is computed there is in its queue, so the wait for it is counted already.
        waited = held.computing * rows.confidence
        seconds = (prompt.num_tokens - waited) * s_per_token
        plans = plans.or_better(_WAIT, held.computing, waited, seconds) or plans
    if held.tiers is not None:
        tiers = held.tiers * rows.confidence
        load_s = (tiers - found) * s_per_token * rows.load_share
        seconds = load_s + (prompt.num_tokens - tiers) * s_per_token
        plans = plans.or_better(_LOAD, held.tiers, tiers, seconds) or plans
    return plans


def with_pulls(prompt: Prompt, rows: Columns, held: Held, plans: Plans, pulled: Pulled) -> Plans | None:
    """What comes lies on the CPU and is loaded from there. None where no pull is better."""
    loaded = pulled.expects - held.device * rows.confidence
    computed = prompt.num_tokens - pulled.expects
    seconds = pulled.fetch_s + (loaded * rows.load_share + computed) * pulled.s_per_token
    return plans.or_better(PULL, pulled.prefix, pulled.expects, seconds)


@dataclass(frozen=True, slots=True)
class Pulled:
    """For each worker what it would fetch: the row to fetch from (one number where it is the same for all), what is
    then expected to be there, and seconds, infinite where there is nothing to fetch; tokens that are missing, and
    seconds to compute one. By source: what it `has`, and `others` that it gives to."""

    source: NDArray[np.intp] | int
    has: Floats
    expects: Floats
    fetch_s: Floats
    others: Floats
    missing: Floats
    s_per_token: Floats

    @property
    def prefix(self) -> Floats | float:
        """What each would have of the prompt then; one number where it is the same for all."""
        return float(self.has[self.source]) if isinstance(self.source, int) else self.has[self.source]

    def pull(self, workers: Sequence[WorkerId], row: int) -> Pull:
        """What one worker would fetch."""
        source = self.source if isinstance(self.source, int) else int(self.source[row])
        return Pull(
            workers[source],
            int(self.has[source]),
            float(self.fetch_s[row]),
            float(self.others[source]),
            float(self.missing[row] * self.s_per_token[row]),
        )


def fetches(rows: Columns, held: Held, sources: Sources, s_per_token: Floats) -> Pulled | None:
    """What each worker would fetch, from the one of its group whose blocks save most; None where nobody has any."""
    have, rates = held.device if held.tiers is None else held.tiers, sources.rates
    token_s = rates.s_per_token * (1.0 + sources.pulls)
    saved = have * sources.shares * (float(s_per_token.max()) - token_s)
    found = have * rows.confidence
    chosen = [(group, source) for group in sources.groups if (source := _source(rows, group, saved)) is not None]
    if not chosen:
        return None
    from_whom: NDArray[np.intp] | int = chosen[0][1]
    if len(chosen[0][0]) < len(have):
        from_whom = np.full(len(have), -1)
        for group, source in chosen:
            from_whom[group] = source
    missing = np.maximum(have[from_whom] - found, 0.0)
    fetch_s = rates.start_s + missing * token_s[from_whom]
    expects = found + missing * sources.shares[from_whom]
    if not isinstance(from_whom, int):
        fetch_s[from_whom < 0] = np.inf
    fetch_s[[source for _, source in chosen]] = np.inf
    return Pulled(from_whom, have, expects, fetch_s, sources.pulls, missing, s_per_token)


def _source(rows: Columns, group: NDArray[np.intp], saved: Floats) -> int | None:
    """Who of a group saves most, the first by name of those that save alike; None where nobody saves anything."""
    within = saved[group]
    most = within.max()
    if most <= 0:
        return None
    best = group[within == most].tolist()
    return int(best[0]) if len(best) == 1 else int(min(best, key=rows.workers.__getitem__))
