"""Whether placement chooses the fastest way to have a prompt, over a grid of fleets whose truth is known.

Knows no worker and no clock. What placement believes is measured with noise, as a router measures it; what its choice
costs is the truth. Every number is the same on every machine.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.sharing.finding import Claim, Finding, Row
from kvstore.block import WorkerId
from router.placement import Candidate, Prompt, Pull, PullRates, place
from router.pulls import PullMeter, timeout_s

LENGTHS = (512, 2048, 8192, 32_768)
PREFILL_TOKENS_PER_S = (2000.0, 10_000.0, 50_000.0)
LINK_TOKENS_PER_S = (2000.0, 20_000.0, 100_000.0, 1_000_000.0)
SHARES = (0.25, 0.5, 0.9, 0.99)
QUEUES_S = (0.0, 0.5, 5.0)
KINDS = ("bare", "half on its CPU", "computing it", "two holders, one giving")
STARTS_S = (0.002, 0.05)
NOISES = (0.0, 0.05, 0.1)
"""Largest error of a rate or a queue, as a share of it. To tenths, two queues that are alike can seem a fifth apart, so
no rule stays within a tenth of the best way everywhere: that one is shown, and claims are made of the others."""
CLAIMED = 0.05
TIMES = 5
PULLS_SEEN = 40
BOUND = 1.10
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Cell:
    """One fleet: who has so much of a prompt keeps it waiting for so long, another worker has no queue."""

    length: int
    prefill: float
    link: float
    share: float
    queue_s: float
    kind: str
    start_s: float

    @property
    def cached(self) -> int:
        return int(self.length * self.share) // BLOCK * BLOCK


@dataclass(frozen=True, slots=True)
class Way:
    """One way to have the prompt."""

    worker: str
    plan: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was chosen in a cell, and what would have been best."""

    cell: Cell
    chosen: Way
    best: Way

    @property
    def ratio(self) -> float:
        return self.chosen.seconds / self.best.seconds


def cells() -> Iterator[Cell]:
    """The whole grid."""
    axes = (LENGTHS, PREFILL_TOKENS_PER_S, LINK_TOKENS_PER_S, SHARES, QUEUES_S, KINDS, STARTS_S)
    return itertools.starmap(Cell, itertools.product(*axes))


LOAD_SHARE = 0.1


def truth(cell: Cell, workers: list[Candidate]) -> list[Way]:
    """Every way there is and what it really takes, straight from the model: no code of the router's."""
    compute_s, pull_s = 1 / cell.prefill, 1 / cell.link
    load_s = LOAD_SHARE * compute_s
    ways = []
    for one in workers:
        queue_s, rest_s = one.queued_tokens * compute_s, cell.length * compute_s
        ways.append(Way(one.worker, "recompute", queue_s + rest_s - one.cached_tokens * compute_s))
        here = max(one.tier_tokens, one.cached_tokens)
        loaded = (here - one.cached_tokens) * load_s
        ways.append(Way(one.worker, "load", queue_s + loaded + rest_s - here * compute_s))
        waited = max(one.computing_tokens, one.cached_tokens)
        ways.append(Way(one.worker, "wait", queue_s + rest_s - waited * compute_s))
        for other in workers:
            if other is not one and other.cached_tokens > here:
                fetch_s = cell.start_s + (other.cached_tokens - here) * pull_s * (1 + other.pulls)
                fetch_s += (other.cached_tokens - one.cached_tokens) * load_s
                ways.append(Way(one.worker, "pull", queue_s + fetch_s + rest_s - other.cached_tokens * compute_s))
    return ways


def workers_of(cell: Cell) -> list[Candidate]:
    """The fleet as it really is."""

    def worker(name: str, **fields: float) -> Candidate:
        told = {"cached_tokens": 0, "queued_tokens": 0.0, "load_share": LOAD_SHARE} | fields
        return Candidate(
            worker=WorkerId(name),
            prefill_tokens_per_s=cell.prefill,
            step_s=0.0,
            slot_wait_s=0.0,
            payload_format="same",
            **told,  # type: ignore[arg-type]
        )

    queued = cell.queue_s * cell.prefill
    holder = worker("holder", cached_tokens=cell.cached, queued_tokens=queued)
    half = cell.cached // (2 * BLOCK) * BLOCK
    match cell.kind:
        case "half on its CPU":
            return [holder, worker("idle", tier_tokens=half)]
        case "computing it":
            ahead = (cell.cached + queued) / 4  # most of it is done
            return [holder, worker("idle"), worker("other", computing_tokens=cell.cached, queued_tokens=ahead)]
        case "two holders, one giving":
            short = int(cell.cached * 0.9) // BLOCK * BLOCK
            giving = worker("holder", cached_tokens=cell.cached, queued_tokens=queued, pulls=2)
            return [giving, worker("other", cached_tokens=short, queued_tokens=queued), worker("idle")]
    return [holder, worker("idle")]


def measured(cell: Cell, rng: random.Random, noise: float) -> PullRates:
    """What a router knows after some pulls of other prompts over this link."""
    meter, now = PullMeter(), 0.0
    for _ in range(PULLS_SEEN):
        tokens = int(rng.choice(LENGTHS) * rng.choice(SHARES))
        now += 1.0
        meter.add(tokens, (cell.start_s + tokens / cell.link) * _noisy(rng, noise), now)
    return meter.rates(1 / cell.prefill, now)


def outcome(cell: Cell, rng: random.Random, rates: PullRates | None, noise: float) -> Outcome:
    """The choice in a cell, with pull rates as given and everything else believed with noise."""
    workers = workers_of(cell)
    believed = [_believed(one, rng, noise) for one in workers]
    placement = place(Prompt(cell.length, 1, b"key"), believed, pull=rates)
    terms = placement.chosen
    assert terms is not None
    ways = truth(cell, workers)
    mine = [way for way in ways if (way.worker, way.plan) == (terms.worker, terms.plan)]
    chosen = mine[0] if terms.pull is None else _pulled(cell, workers, terms.worker, terms.pull)
    return Outcome(cell, chosen, min(ways, key=lambda way: way.seconds))


def _pulled(cell: Cell, workers: list[Candidate], target: str, pull: Pull) -> Way:
    """What a pull really takes, with the deadline that goes with it."""
    by_name = {one.worker: one for one in workers}
    one, source = by_name[WorkerId(target)], by_name[pull.source]
    here = max(one.tier_tokens, one.cached_tokens)
    token_s = (1 + source.pulls) / cell.link
    fetch_s = cell.start_s + (source.cached_tokens - here) * token_s
    came = float(source.cached_tokens)
    if fetch_s > (limit_s := timeout_s(pull)):
        fetch_s, came = limit_s, here + max(0.0, limit_s - cell.start_s) / token_s
    loaded_s = (came - one.cached_tokens) * LOAD_SHARE / cell.prefill
    return Way(target, "pull", (one.queued_tokens + cell.length - came) / cell.prefill + fetch_s + loaded_s)


def _believed(one: Candidate, rng: random.Random, noise: float) -> Candidate:
    return replace(
        one,
        prefill_tokens_per_s=one.prefill_tokens_per_s * _noisy(rng, noise),
        queued_tokens=one.queued_tokens * _noisy(rng, noise),
        load_share=one.load_share * _noisy(rng, noise),
    )


def _noisy(rng: random.Random, noise: float) -> float:
    return rng.uniform(1 - noise, 1 + noise)


def run() -> Finding:
    """Every cell, several times over: by what was measured, before any pull was measured, and without pulls."""
    grid, rng = list(cells()), random.Random(7)
    rows, claims = [], []
    for noise in NOISES:
        found = [outcome(cell, rng, measured(cell, rng, noise), noise) for _ in range(TIMES) for cell in grid]
        rows.append(_row(f"pulls measured, errors to {noise:.0%}", found))
        if noise > CLAIMED:
            continue
        late = sum(one.ratio > BOUND for one in found)
        claims.append(Claim(f"errors to {noise:.0%}: cells that take over {BOUND} times the best way", late, "=", 0))
        worst = round(max(one.ratio for one in found), 3)
        claims.append(Claim(f"errors to {noise:.0%}: the worst cell, times the best way", worst, "<=", BOUND))
    bare = [outcome(cell, rng, None, CLAIMED) for cell in grid]
    first = [outcome(cell, rng, PullMeter().rates(1 / cell.prefill, 0.0), CLAIMED) for cell in grid]
    rows += [_row("pulls not measured yet", first), _row("no pulls", bare)]
    seconds = [sum(one.chosen.seconds for one in some) for some in (bare, first, found)]
    claims += [
        Claim("ways that are best somewhere", len({one.best.plan for one in found}), "=", 4),
        Claim("seconds of all cells without pulls / with them", round(seconds[0] / seconds[2] * TIMES, 3), ">", 1.0),
        Claim("the same before any was measured", round(seconds[0] / seconds[1], 3), ">", 1.0),
    ]
    setting = (
        f"{len(grid)} cells, {TIMES} times: prompts of {LENGTHS} tokens, {PREFILL_TOKENS_PER_S} computed and "
        f"{LINK_TOKENS_PER_S} sent a second, {SHARES} of it cached, {QUEUES_S} s queued before it, pulls begin in "
        f"{STARTS_S} s; rates and queues believed with errors"
    )
    return Finding("choice", setting, tuple(rows), tuple(claims))


def _row(name: str, found: list[Outcome]) -> Row:
    ratios = sorted(one.ratio for one in found)
    plans = Counter(one.chosen.plan for one in found)
    return {
        "rates": name,
        **{plan: plans[plan] for plan in ("recompute", "load", "pull", "wait")},
        "mean": round(sum(ratios) / len(ratios), 3),
        "p99": round(ratios[int(len(ratios) * 0.99)], 3),
        "worst": round(ratios[-1], 3),
        "over 1.1": sum(ratio > BOUND for ratio in ratios),
    }
