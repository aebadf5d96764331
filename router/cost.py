"""What it costs to serve a prompt at each worker, in seconds: the one place where the terms are computed.

Works on columns, a number for each worker, so that 500 workers take hardly longer than 8. Knows no clock and no live
state. Invariant: a worker's cost depends on its own row alone, but for the source of a pull.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from kvstore.block import WorkerId
from router.unheard import Others, expected

Floats = NDArray[np.float64]
Plan = Literal["recompute", "wait", "load", "pull"]
PLANS: tuple[Plan, ...] = ("recompute", "wait", "load", "pull")
_WAIT, _LOAD, _PULL = 1, 2, 3

BEHIND = 6.0
"""A second that requests behind this one are kept waiting costs more than itself: some go elsewhere for it, compute
anew what they would have found, and keep others waiting there. Chosen on two traces, 3 against 6: 6 finds more
cached tokens in three of four replays, and fewer, with a longer tail, in tau-bench with the larger cache."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What placement needs of a request. `tie_key` is equal for requests that should meet on an idle fleet.

    `ttft_s` is the time to first token that its tenant shall get; 0 for none.
    """

    num_tokens: int
    max_tokens: int
    tie_key: bytes
    ttft_s: float = 0.0

    @property
    def num_positions(self) -> int:
        """Most positions the request can fill; its last token is never computed."""
        return self.num_tokens + self.max_tokens - 1


@dataclass(frozen=True, slots=True)
class PullRates:
    """What blocks of a peer cost: `start_s` once, `s_per_token` for each, times one more for each pull there is."""

    start_s: float
    s_per_token: float


@dataclass(frozen=True, slots=True)
class Sources:
    """Who may give blocks to whom: the rows of each group to each other. `pulls` under way from each, and the share
    that came of what was asked of it lately."""

    rates: PullRates
    groups: tuple[NDArray[np.intp], ...]
    pulls: Floats
    shares: Floats


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
class Terms:
    """The cost of one worker, in seconds. The first four are the time to first token, the others what others lose.

    `queue_s`: prefill ahead of the request. `slot_s`: until a sequence ends where all slots are taken. `step_s`: the
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
class Columns:
    """What is believed of each worker whatever the prompt; rows are workers. See `placement.Candidate` for each.

    `others`: what other routers are expected to place at this moment.
    """

    workers: tuple[WorkerId, ...]
    name_hashes: NDArray[np.uint64]
    queued: Floats
    s_per_token: Floats
    step_s: Floats
    slot_s: Floats
    running: Floats
    free_tokens: Floats
    reuse: Floats
    load_share: Floats
    confidence: Floats
    arrivals_per_s: Floats
    utilization: Floats
    others: Others | None = None

    @staticmethod
    def of(workers: Sequence[WorkerId]) -> Columns:
        """Rows of zeros, and of full confidence, for these workers."""
        hashes = np.array([xxh3_64_intdigest(worker.encode()) for worker in workers], dtype=np.uint64)
        columns = Columns(tuple(workers), hashes, *np.zeros((_NUM_FLOATS, len(workers))))
        columns.confidence[:] = 1.0
        return columns


_NUM_FLOATS = sum(field.type == "Floats" for field in fields(Columns))


@dataclass(slots=True)
class Held:
    """Prompt tokens by worker, each a prefix: on its device; on either tier; on its device or being computed.

    None where no worker has more than on its device, or none can give blocks to another. `length_factor`: how much
    longer than the average a token takes in prompts of this length.
    """

    device: Floats
    tiers: Floats | None = None
    computing: Floats | None = None
    sources: Sources | None = None
    length_factor: float = 1.0


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
    def prefix(self) -> Floats:
        """What each would have of the prompt then."""
        return np.broadcast_to(self.has[self.source], self.has.shape)

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
        return self.cached if self.pulled is None else np.where(self.plan == _PULL, 0.0, self.cached)

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
            self.pulled.pull(self.workers, row) if self.pulled is not None and self.plan[row] == _PULL else None,
        )


def cost(prompt: Prompt, rows: Columns, held: Held, out: NDArray[np.bool_] | None = None) -> Costs:
    """Every term of every worker; `out` are those that cannot be chosen.

    Pulls are looked at where one could be the best: what it takes to begin and to compute the rest is less than any
    worker takes without.
    """
    unheard = None if rows.others is None else _unheard(rows, rows.others, out)
    costs = _cost(prompt, rows, held, None, unheard)
    if held.sources is None:
        return costs
    have = held.device if held.tiers is None else held.tiers
    rest_s = (prompt.num_tokens - have.max()) * rows.s_per_token.min() * held.length_factor
    total_s = costs.total_s if out is None else costs.total_s[~out]
    if not prompt.ttft_s and total_s.min() <= held.sources.rates.start_s + rest_s:
        return costs
    return _cost(prompt, rows, held, held.sources, unheard)


def _unheard(rows: Columns, others: Others, out: NDArray[np.bool_] | None) -> Floats:
    ready_s = rows.queued * rows.s_per_token + rows.slot_s + rows.step_s
    return expected(ready_s if out is None else np.where(out, np.inf, ready_s), rows.s_per_token, others.tokens)


def _cost(prompt: Prompt, rows: Columns, held: Held, sources: Sources | None, unheard: Floats | None) -> Costs:
    s_per_token = rows.s_per_token
    own_s_per_token = s_per_token if held.length_factor == 1.0 else s_per_token * held.length_factor
    pulled = None if sources is None else _pulled(rows, held, sources, own_s_per_token)
    plan, cached, expected, plan_s = _plans(prompt, rows, held, pulled, own_s_per_token)
    missing = prompt.num_tokens - expected
    compute_s = missing * own_s_per_token
    queue_s = (rows.queued if unheard is None else rows.queued + unheard) * s_per_token
    slot_s, step_s = rows.slot_s.copy(), rows.step_s.copy()
    ttft_s = queue_s + slot_s + step_s + plan_s
    decode_s = compute_s * rows.running
    # Requests that arrive while this one, what is ahead of it and they themselves keep the worker busy all come later
    # by what it computes: so many they are, on average, in a queue with one server.
    followers = (queue_s + plan_s) * rows.arrivals_per_s / (1.0 - rows.utilization)
    behind_s = BEHIND * compute_s * followers
    evicted = np.maximum(prompt.num_tokens - held.device - rows.free_tokens, 0.0)
    eviction_s = evicted * s_per_token * rows.reuse
    total_s = ttft_s + decode_s + behind_s + eviction_s
    return Costs(
        rows.workers,
        plan,
        cached,
        expected,
        queue_s,
        slot_s,
        step_s,
        plan_s,
        decode_s,
        behind_s,
        eviction_s,
        ttft_s,
        total_s,
        pulled,
        unheard,
    )


def _plans(
    prompt: Prompt, rows: Columns, held: Held, pulled: Pulled | None, s_per_token: Floats
) -> tuple[NDArray[np.int8], Floats, Floats, Floats]:
    """For each worker its cheapest plan, the prefix that is not computed, how much of it will be found, and seconds."""
    cached = held.device
    expected = cached * rows.confidence
    plan_s = (prompt.num_tokens - expected) * s_per_token
    plan = np.zeros(len(cached), np.int8)
    found = expected
    options: list[tuple[int, Floats, Floats, Floats]] = []
    if held.computing is not None:
        # What is computed there is in its queue, so the wait for it is counted already.
        waited = held.computing * rows.confidence
        options.append((_WAIT, held.computing, waited, (prompt.num_tokens - waited) * s_per_token))
    if held.tiers is not None:
        tiers = held.tiers * rows.confidence
        load_s = (tiers - found) * s_per_token * rows.load_share
        options.append((_LOAD, held.tiers, tiers, load_s + (prompt.num_tokens - tiers) * s_per_token))
    if pulled is not None:
        # What comes lies on the CPU and is loaded from there.
        load_s = (pulled.expects - found) * s_per_token * rows.load_share
        seconds = pulled.fetch_s + load_s + (prompt.num_tokens - pulled.expects) * s_per_token
        options.append((_PULL, pulled.prefix, pulled.expects, seconds))
    for code, prefix, expects, seconds in options:
        better = (prefix > cached) & (seconds < plan_s)
        plan[better] = code
        cached, expected = np.where(better, prefix, cached), np.where(better, expects, expected)
        plan_s = np.where(better, seconds, plan_s)
    return plan, cached, expected, plan_s


def _pulled(rows: Columns, held: Held, sources: Sources, s_per_token: Floats) -> Pulled | None:
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


def rendezvous(rows: Columns, among: NDArray[np.intp], key: bytes) -> int:
    """The one of these rows with the highest hash of worker and key: for one key the same in every router."""
    mixed = rows.name_hashes[among] ^ np.uint64(xxh3_64_intdigest(key))
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int(among[(mixed ^ (mixed >> np.uint64(31))).argmax()])
