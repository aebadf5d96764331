"""Where a request goes: candidates in, one frozen `Placement` with every term out. All costs are seconds.

Knows no clock, no network and no live state: equal candidates give equal placements in every router. Near ties are
settled by what needs no talking: least new work, then a rendezvous hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from xxhash import xxh3_64_intdigest

from kvstore.block import WorkerId

TIE_FRACTION = 0.02
TIE_S = 1e-3
RATE_NOISE = 0.25
"""Measured rates this near to the fleet's mean count as equal: else noise decides where all cold prompts go."""
UNMEASURED_PREFILL_TOKENS_PER_S = 2000.0

Policy = Literal["cost", "round_robin"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs of a request. `tie_key` is equal for requests that should meet on an idle fleet."""

    num_tokens: int
    max_tokens: int
    tie_key: bytes

    @property
    def num_positions(self) -> int:
        """Most positions the request can fill; its last token is never computed."""
        return self.num_tokens + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is believed of a worker at the moment of a decision.

    `cached_tokens`: of this prompt, held or being computed there. `queued_tokens`: uncached prompt tokens ahead of this
    request. `prefill_tokens_per_s` is 0 while unmeasured. `slot_wait_s`: time until a sequence ends where all slots are
    taken. `excluded` says why it cannot be chosen, empty if it can.
    """

    worker: WorkerId
    cached_tokens: int
    queued_tokens: int
    prefill_tokens_per_s: float
    step_s: float
    slot_wait_s: float
    excluded: str = ""


@dataclass(frozen=True, slots=True)
class Terms:
    """The cost of one candidate.

    `queue_s`: prefill and slots ahead of the request. `step_s`: the running step, which it waits out. `prefill_s`: its
    own uncached tokens. `recompute_s`: of these, what some other worker already has, counted once more because it is
    work the fleet need not do.
    """

    worker: WorkerId
    cached_tokens: int
    uncached_tokens: int
    queue_s: float
    step_s: float
    prefill_s: float
    recompute_s: float

    @property
    def total_s(self) -> float:
        """What is compared."""
        return self.queue_s + self.step_s + self.prefill_s + self.recompute_s


@dataclass(frozen=True, slots=True)
class Placement:
    """A decision. `worker` is None when every candidate is excluded; `excluded` pairs workers and reasons."""

    worker: WorkerId | None
    reason: str
    predicted_cached: int
    uncached_tokens: int
    terms: tuple[Terms, ...]
    excluded: tuple[tuple[WorkerId, str], ...]


def place(prompt: Prompt, candidates: Sequence[Candidate], policy: Policy = "cost", turn: int = 0) -> Placement:
    """Choose a worker for `prompt`. `turn` is the number of the decision, for `round_robin` alone."""
    excluded = tuple((c.worker, c.excluded) for c in candidates if c.excluded)
    eligible = [c for c in candidates if not c.excluded]
    if not eligible:
        return Placement(None, "no worker can take it", 0, prompt.num_tokens, (), excluded)
    terms = _cost(prompt, eligible)
    if policy == "round_robin":
        chosen, reason = sorted(terms, key=_name)[turn % len(terms)], "its turn"
    else:
        chosen, reason = _cheapest(prompt, terms)
    return Placement(chosen.worker, reason, chosen.cached_tokens, chosen.uncached_tokens, tuple(terms), excluded)


def _cost(prompt: Prompt, eligible: Sequence[Candidate]) -> list[Terms]:
    most_cached = max(c.cached_tokens for c in eligible)
    typical = _typical_rate(eligible)
    terms: list[Terms] = []
    for c in eligible:
        second = 1.0 / _rate(c, typical)
        uncached = prompt.num_tokens - c.cached_tokens
        queue_s = c.queued_tokens * second + c.slot_wait_s
        recompute_s = (most_cached - c.cached_tokens) * second
        terms.append(Terms(c.worker, c.cached_tokens, uncached, queue_s, c.step_s, uncached * second, recompute_s))
    return terms


def _rate(candidate: Candidate, typical: float) -> float:
    own = candidate.prefill_tokens_per_s
    return own if own and abs(own - typical) > RATE_NOISE * typical else typical


def _typical_rate(eligible: Sequence[Candidate]) -> float:
    measured = [c.prefill_tokens_per_s for c in eligible if c.prefill_tokens_per_s]
    return sum(measured) / len(measured) if measured else UNMEASURED_PREFILL_TOKENS_PER_S


def _cheapest(prompt: Prompt, terms: Sequence[Terms]) -> tuple[Terms, str]:
    totals = [t.total_s for t in terms]
    least = min(totals)
    limit = max(least * (1 + TIE_FRACTION), least + TIE_S)
    near = [t for t, total in zip(terms, totals, strict=True) if total <= limit]
    if len(near) == 1:
        return near[0], "least cost"
    fewest = min(t.uncached_tokens for t in near)
    tied = [t for t in near if t.uncached_tokens == fewest]
    if len(tied) == 1:
        return tied[0], "near tie, most cached"
    return max(tied, key=lambda t: (_weight(prompt.tie_key, t.worker), t.worker)), "near tie, rendezvous"


def _weight(tie_key: bytes, worker: WorkerId) -> int:
    return xxh3_64_intdigest(tie_key + worker.encode())


def _name(terms: Terms) -> WorkerId:
    return terms.worker
