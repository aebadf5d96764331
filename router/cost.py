"""What it costs to serve a prompt at each worker, in seconds: the one place where the terms are computed.

Works on columns, a number for each worker. Knows no clock and no live state. Invariant: a worker's cost depends on its
own row alone, but for the source of a pull.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.block import WorkerId
from router.columns import Columns, Floats, Held, Prompt
from router.plans import PLANS, PULL, Plan, Plans, Pull, Pulled, cheapest, fetches, with_pulls
from router.unheard import Others, expected

BEHIND = 6.0
"""A second that requests behind this one are kept waiting costs more than itself: some go elsewhere for it, compute
anew what they would have found, and keep others waiting there. Chosen between 3 and 6 on two traces, where 6 finds more
cached tokens in three of four replays; of four made-up traces that were not looked at before, three agree."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The cost of one worker, in seconds. The first four are the time to first token, the others what others lose.

    `queue_s`: prefill ahead of the request. `slot_s`: until there is a slot for it where all are taken. `step_s`: the
    running step, which it waits out. `plan_s`: of the cheapest plan. `decode_s`: put on the decodes that run there,
    summed. `behind_s`: put on requests that will come to queue behind it. `eviction_s`: to compute again what it
    evicts. `expected_cached` is `cached_tokens` times how far such predictions of this worker came true. `pull` is set
    with that plan alone.
    """

    worker: WorkerId
    plan: Plan
    cached_tokens: int
    expected_cached: float
    uncached_tokens: int
    queue_s: float
    slot_s: float
    step_s: float
    plan_s: float
    decode_s: float
    behind_s: float
    eviction_s: float
    pull: Pull | None = None

    @property
    def ttft_s(self) -> float:
        """Predicted time to the first token."""
        return self.queue_s + self.slot_s + self.step_s + self.plan_s

    @property
    def total_s(self) -> float:
        """What is compared."""
        return self.ttft_s + self.decode_s + self.behind_s + self.eviction_s


@dataclass(slots=True)
class Costs:
    """All terms of all workers, as columns; those of `Terms`. `unheard`: where tokens are expected of other routers."""

    workers: tuple[WorkerId, ...]
    plan: NDArray[np.int8]
    cached: Floats
    expected: Floats
    queue_s: Floats
    slot_s: Floats
    step_s: Floats
    plan_s: Floats
    decode_s: Floats
    behind_s: Floats
    eviction_s: Floats
    ttft_s: Floats
    total_s: Floats
    pulled: Pulled | None = None
    unheard: Floats | None = None

    @property
    def held_here(self) -> Floats:
        """Tokens of the prompt that each has by itself, or computes; 0 where the best is to fetch some."""
        return self.cached if self.pulled is None else np.where(self.plan == PULL, 0.0, self.cached)

    def terms(self, row: int, num_tokens: int) -> Terms:
        """One row as plain values."""
        expected = float(self.expected[row])
        return Terms(
            self.workers[row],
            PLANS[self.plan[row]],
            int(self.cached[row]),
            expected,
            num_tokens - int(expected),
            float(self.queue_s[row]),
            float(self.slot_s[row]),
            float(self.step_s[row]),
            float(self.plan_s[row]),
            float(self.decode_s[row]),
            float(self.behind_s[row]),
            float(self.eviction_s[row]),
            self.pulled.pull(self.workers, row) if self.pulled is not None and self.plan[row] == PULL else None,
        )


def cost(prompt: Prompt, rows: Columns, held: Held, out: NDArray[np.bool_] | None = None) -> Costs:
    """Every term of every worker; `out` are those that cannot be chosen.

    Pulls are looked at where one could be the best: what it takes to begin and to compute the rest is less than any
    worker takes without.
    """
    s_per_token = rows.s_per_token if held.length_factor == 1.0 else rows.s_per_token * held.length_factor
    unheard = None if rows.others is None else _unheard(rows, rows.others, out)
    before = _before(prompt, rows, held, unheard)
    plans = cheapest(prompt, rows, held, s_per_token)
    costs = _costs(prompt, rows, before, plans, s_per_token)
    if held.sources is None:
        return costs
    have = held.device if held.tiers is None else held.tiers
    rest_s = held.sources.rates.start_s + (prompt.num_tokens - float(have.max())) * s_per_token
    least_s = before.wait_s + rest_s
    total_s = costs.total_s
    if out is not None:
        least_s, total_s = least_s[~out], total_s[~out]
    if not prompt.ttft_s and total_s.min() <= least_s.min():
        return costs
    pulled = fetches(rows, held, held.sources, s_per_token)
    better = None if pulled is None else with_pulls(prompt, rows, held, plans, pulled)
    return costs if better is None else _costs(prompt, rows, before, better, s_per_token, pulled=pulled)


def _unheard(rows: Columns, others: Others, out: NDArray[np.bool_] | None) -> Floats:
    ready_s = rows.queued * rows.s_per_token + rows.slot_s + rows.step_s
    return expected(ready_s if out is None else np.where(out, np.inf, ready_s), rows.s_per_token, others.tokens)


@dataclass(frozen=True, slots=True)
class _Before:
    """What does not depend on a request's own plan. `busy_s`: of all that queue; `queue_s` what comes before it;
    `wait_s` is the sum of that, a slot and the step."""

    busy_s: Floats
    queue_s: Floats
    slot_s: Floats
    step_s: Floats
    eviction_s: Floats
    wait_s: Floats
    unheard: Floats | None = None


def _before(prompt: Prompt, rows: Columns, held: Held, unheard: Floats | None) -> _Before:
    busy_s = (rows.queued if unheard is None else rows.queued + unheard) * rows.s_per_token
    queue_s, slot_s, step_s = busy_s, rows.slot_s.copy(), rows.step_s.copy()
    if held.ahead is not None:
        queue_s, slot_s = queue_s * held.ahead, slot_s * held.ahead
    evicted = np.maximum(prompt.num_tokens - held.device - rows.free_tokens, 0.0)
    eviction_s = evicted * rows.s_per_token * rows.reuse
    return _Before(busy_s, queue_s, slot_s, step_s, eviction_s, queue_s + slot_s + step_s, unheard)


def _costs(
    prompt: Prompt, rows: Columns, before: _Before, plans: Plans, s_per_token: Floats, *, pulled: Pulled | None = None
) -> Costs:
    compute_s = (prompt.num_tokens - plans.expected) * s_per_token
    ttft_s = before.wait_s + plans.seconds
    decode_s = compute_s * rows.running
    # Requests that arrive while this one, what is ahead of it and they themselves keep the worker busy all come later
    # by what it computes: so many they are, on average, in a queue with one server.
    followers = (before.busy_s + plans.seconds) * rows.arrivals_per_s / (1.0 - rows.utilization)
    behind_s = BEHIND * compute_s * followers
    return Costs(
        rows.workers,
        plans.plan,
        plans.cached,
        plans.expected,
        before.queue_s,
        before.slot_s,
        before.step_s,
        plans.seconds,
        decode_s,
        behind_s,
        before.eviction_s,
        ttft_s,
        ttft_s + decode_s + behind_s + before.eviction_s,
        pulled,
        before.unheard,
    )
