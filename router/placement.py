"""Where a request goes: candidates in, one frozen `Placement` with every term out. All costs are seconds.

Knows no clock, no network and no live state: equal candidates give equal placements in every router. Near ties are
settled by what needs no talking: least new work, then a rendezvous hash among those that did not work much lately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvstore.block import WorkerId
from router.columns import Columns, Floats, Held, Prompt, PullRates, rendezvous
from router.cost import Costs, Terms, cost
from router.plans import Pull
from router.pulls import Givers
from router.rates import seconds_per_token
from router.unheard import Others

__all__ = ["Candidate", "Placement", "Policy", "Prompt", "Pull", "PullRates", "Terms", "choose", "place"]

TIE_FRACTION = 0.02
TIE_S = 1e-3
BOUND = 1.25
"""Of workers that tie, those that were busy for longer than this times their mean are passed over."""
NO_WORKER = "no worker can take it"
TOO_SLOW = "no worker can start it in the tenant's time"

Policy = Literal["cost", "round_robin"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is believed of a worker at the moment of a decision.

    Prefixes of this prompt, in tokens: `cached_tokens` on its device, `tier_tokens` on either tier, `computing_tokens`
    on its device or being computed there; 0 for no more than on its device. `queued_tokens`: uncached prompt tokens
    ahead of this request. `prefill_tokens_per_s` is 0 while unmeasured. `slot_wait_s`: time until a sequence ends where
    all slots are taken. `running`: sequences past their prompt. `free_tokens`: room on the device that holds nothing.
    `reuse`: probability that what it evicts next is asked for again. `load_share`: what a token loaded from its CPU
    tier takes of the time of one that is computed. `confidence`: how much of a predicted prefix it then found.
    `arrivals_per_s` and `utilization`: of late. `payload_format`: workers with the same give blocks to each other, with
    none to nobody; `pulls` under way from it, and the share of what was asked of it that came. `ahead`: how much of its
    queue is served before this request, whose tenant may have little there. `excluded` says why it cannot be chosen,
    empty if it can.
    """

    worker: WorkerId
    cached_tokens: int
    queued_tokens: float
    prefill_tokens_per_s: float
    step_s: float
    slot_wait_s: float
    excluded: str = ""
    tier_tokens: int = 0
    computing_tokens: int = 0
    running: int = 0
    free_tokens: int = 0
    reuse: float = 0.0
    load_share: float = 0.1
    confidence: float = 1.0
    arrivals_per_s: float = 0.0
    utilization: float = 0.0
    payload_format: str = ""
    pulls: int = 0
    pull_share: float = 1.0
    ahead: float = 1.0


@dataclass(frozen=True, slots=True)
class Placement:
    """A decision. `worker` is None when no candidate can take it; `excluded` pairs workers and reasons.

    `predicted_cached` is the prefix that the chosen worker is believed to have, `uncached_tokens` what it is expected
    to compute. `retry_after_s`: when to try again where all would be too slow.
    """

    worker: WorkerId | None
    reason: str
    predicted_cached: int
    uncached_tokens: int
    excluded: tuple[tuple[WorkerId, str], ...]
    chosen: Terms | None = None
    retry_after_s: float = 0.0
    num_tokens: int = 0
    _costs: Costs | None = field(default=None, repr=False, compare=False)

    @property
    def pull(self) -> Pull | None:
        """What the chosen worker shall fetch first, and from whom."""
        return None if self.chosen is None else self.chosen.pull

    @property
    def terms(self) -> tuple[Terms, ...]:
        """Of every candidate that is not excluded, the cheapest first."""
        if self._costs is None:
            return ()
        out = {worker for worker, _ in self.excluded}
        rows = (row for row, worker in enumerate(self._costs.workers) if worker not in out)
        return tuple(sorted((self._costs.terms(row, self.num_tokens) for row in rows), key=_order))


def place(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    policy: Policy = "cost",
    turn: int = 0,
    *,
    pull: PullRates | None = None,
    length_factor: float = 1.0,
    others: Others | None = None,
) -> Placement:
    """Choose a worker for `prompt`. `turn` is the number of the decision, for `round_robin` alone.

    `others`: what other routers are expected to place at this moment.
    """
    excluded = tuple((c.worker, c.excluded) for c in candidates if c.excluded)
    if len(excluded) == len(candidates):
        return Placement(None, NO_WORKER, 0, prompt.num_tokens, excluded, num_tokens=prompt.num_tokens)
    rows, held = _columns(candidates)
    held.length_factor = length_factor
    rows.others = others
    if pull is not None:
        givers = Givers(len(candidates))
        for row, c in enumerate(candidates):
            givers.write(row, c.payload_format, c.pulls, c.pull_share)
        held.sources = givers.sources(pull) if givers.can_give else None
    out = np.array([bool(c.excluded) for c in candidates])
    costs = cost(prompt, rows, held, out if excluded else None)
    return choose(prompt, rows, costs, (out, excluded) if excluded else None, (policy, turn))


def choose(
    prompt: Prompt,
    rows: Columns,
    costs: Costs,
    excluded: tuple[NDArray[np.bool_], tuple[tuple[WorkerId, str], ...]] | None = None,
    by: tuple[Policy, int] = ("cost", 0),
) -> Placement:
    """The decision on costs that are known. `excluded`: which rows, at least one being left, and their reasons."""
    out, reasons = excluded or (None, ())
    total_s = costs.total_s if out is None else np.where(out, np.inf, costs.total_s)
    if prompt.ttft_s:
        total_s, retry_after_s = _in_time(prompt.ttft_s, costs, total_s)
        if retry_after_s:
            return Placement(
                None, TOO_SLOW, 0, prompt.num_tokens, reasons, None, retry_after_s, prompt.num_tokens, costs
            )
    policy, turn = by
    if policy == "round_robin":
        able = sorted(np.flatnonzero(np.isfinite(total_s)).tolist(), key=rows.workers.__getitem__)
        row, reason = able[turn % len(able)], "its turn"
    else:
        row, reason = _cheapest(prompt, rows, costs, total_s)
    terms = costs.terms(row, prompt.num_tokens)
    return Placement(
        terms.worker,
        reason,
        terms.cached_tokens,
        terms.uncached_tokens,
        reasons,
        terms,
        num_tokens=prompt.num_tokens,
        _costs=costs,
    )


def _in_time(ttft_s: float, costs: Costs, total_s: Floats) -> tuple[Floats, float]:
    """Costs of those that meet the time alone; else, where waiting would help, for how long to wait.

    A time that no worker could meet with nothing ahead of the request keeps nobody out.
    """
    able = np.isfinite(total_s)
    meets = able & (costs.ttft_s <= ttft_s)
    if meets.any():
        return np.where(meets, total_s, np.inf), 0.0
    if (costs.plan_s[able] + costs.step_s[able]).min() > ttft_s:
        return total_s, 0.0
    return total_s, float(costs.ttft_s[able].min()) - ttft_s


def _cheapest(prompt: Prompt, rows: Columns, costs: Costs, total_s: Floats) -> tuple[int, str]:
    if costs.unheard is not None and rows.others is not None:
        total_s = _apart(rows.others, costs, costs.unheard, total_s)
    least = float(total_s.min())
    near = np.flatnonzero(total_s <= max(least * (1 + TIE_FRACTION), least + TIE_S))
    if len(near) == 1:
        return int(near[0]), "least cost"
    expected = costs.expected[near]
    tied = near[expected == expected.max()]
    if len(tied) == 1:
        return int(tied[0]), "near tie, most cached"
    busy = rows.utilization[tied]
    if busy.any():
        # Sorted, so that the order of rows does not show in the last bit of the mean.
        tied = tied[busy <= max(BOUND * float(np.sort(busy).mean()), float(busy.min()))]
    return rendezvous(rows, tied, prompt.tie_key), "near tie, rendezvous"


def _apart(others: Others, costs: Costs, unheard: Floats, total_s: Floats) -> Floats:
    """Without those that have no more of the prompt than any, but for this router's part of them.

    Other routers see the same least cost at the same moment and would all go there.
    """
    able = np.isfinite(total_s)
    held = costs.held_here
    more = held > held[able].min()
    weights = np.where(able & ~more, unheard, 0.0)
    if not weights.any():
        return total_s
    return np.where(more | others.part(weights), total_s, np.inf)


def _columns(candidates: Sequence[Candidate]) -> tuple[Columns, Held]:
    rows = Columns.of([c.worker for c in candidates])
    rows.queued[:] = [c.queued_tokens for c in candidates]
    rows.s_per_token[:] = seconds_per_token(np.array([c.prefill_tokens_per_s for c in candidates]))
    rows.step_s[:] = [c.step_s for c in candidates]
    rows.slot_s[:] = [c.slot_wait_s for c in candidates]
    rows.running[:] = [c.running for c in candidates]
    rows.free_tokens[:] = [c.free_tokens for c in candidates]
    rows.reuse[:] = [c.reuse for c in candidates]
    rows.load_share[:] = [c.load_share for c in candidates]
    rows.confidence[:] = [c.confidence for c in candidates]
    rows.arrivals_per_s[:] = [c.arrivals_per_s for c in candidates]
    rows.utilization[:] = [c.utilization for c in candidates]
    device = np.array([c.cached_tokens for c in candidates], float)
    tiers = np.array([max(c.tier_tokens, c.cached_tokens) for c in candidates], float)
    computing = np.array([max(c.computing_tokens, c.cached_tokens) for c in candidates], float)
    held = Held(device)
    held.tiers = tiers if (tiers > device).any() else None
    held.computing = computing if (computing > device).any() else None
    held.ahead = np.array([c.ahead for c in candidates])
    return rows, held


def _order(terms: Terms) -> tuple[float, WorkerId]:
    return terms.total_s, terms.worker
