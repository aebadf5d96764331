"""What others do: each baseline names a worker for a request from what a router knows of load and prefixes.

Knows no clock and no worker. None from `choose` leaves the decision to the real placement.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from kvstore.block import WorkerId

BOUND = 1.25
"""Most load over the mean that a worker chosen by hash may have."""
THRESHOLD = 0.1
"""Least part of a prompt that a worker must have, to be chosen for it."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request, as a router sees it. `sticky`: equal within a session, or for one first private block.

    `holders`: leading blocks of the prompt at each worker; `queued`: tokens that are ahead of it there.
    """

    num_blocks: int
    sticky: bytes
    outstanding: Mapping[WorkerId, int]
    holders: Callable[[], Mapping[WorkerId, int]]
    queued: Callable[[], Mapping[WorkerId, int]]

    def least(self, workers: Sequence[WorkerId] = ()) -> WorkerId:
        """The worker with the fewest requests, of these or of all."""
        return min(workers or self.outstanding, key=lambda worker: (self.outstanding[worker], worker))

    def longest(self) -> tuple[int, list[WorkerId]]:
        """How many leading blocks the best workers have, and who they are."""
        held = self.holders()
        most = max(held.values())
        return most, [worker for worker, blocks in held.items() if blocks == most]

    def ranked(self) -> list[WorkerId]:
        """All workers in the order of their rendezvous weights."""
        return sorted(self.outstanding, key=lambda worker: -xxh3_64_intdigest(self.sticky + worker.encode()))


Choose = Callable[[Question], WorkerId | None]


def round_robin() -> Choose:
    """One after the other."""
    turn = 0

    def choose(question: Question) -> WorkerId:
        nonlocal turn
        turn += 1
        return sorted(question.outstanding)[turn % len(question.outstanding)]

    return choose


def any_worker() -> Choose:
    """At random, the same in every run."""
    rng = random.Random(0)
    return lambda question: rng.choice(sorted(question.outstanding))


def least_outstanding() -> Choose:
    """Fewest requests in flight."""
    return Question.least


def session_sticky() -> Choose:
    """Where the session's first request went, which goes to the least loaded."""
    homes: dict[bytes, WorkerId] = {}
    return lambda question: homes.setdefault(question.sticky, question.least())


def bounded_rendezvous() -> Choose:
    """The highest weight among those that are not over the mean load by a quarter."""

    def choose(question: Question) -> WorkerId:
        load = question.outstanding
        most = math.ceil(BOUND * (sum(load.values()) + 1) / len(load))
        return next(worker for worker in question.ranked() if load[worker] < most)

    return choose


def longest_prefix() -> Choose:
    """Most blocks of the prompt, whatever the load; the least loaded of equals."""
    return lambda question: question.least(question.longest()[1])


def longest_prefix_10() -> Choose:
    """As `longest_prefix` where a tenth of the prompt is there, else the least loaded."""

    def choose(question: Question) -> WorkerId:
        most, workers = question.longest()
        return question.least(workers if most >= THRESHOLD * question.num_blocks else ())

    return choose


def least_queued() -> Choose:
    """Fewest tokens to compute ahead of it, then fewest requests, then fewest so far."""
    given: Counter[WorkerId] = Counter()

    def choose(question: Question) -> WorkerId:
        queued, load = question.queued(), question.outstanding
        chosen = min(load, key=lambda worker: (queued[worker], load[worker], given[worker], worker))
        given[chosen] += 1
        return chosen

    return choose


def real_placement() -> Choose:
    """Pando's own."""
    return lambda question: None


POLICIES: Mapping[str, Callable[[], Choose]] = {
    "pando": real_placement,
    "round_robin": round_robin,
    "random": any_worker,
    "least_outstanding": least_outstanding,
    "session_sticky": session_sticky,
    "bounded_rendezvous": bounded_rendezvous,
    "longest_prefix": longest_prefix,
    "longest_prefix_10": longest_prefix_10,
    "one_pool": least_queued,
}
"""`one_pool` is no policy but a bound: one cache of the total size, and the work spread evenly."""
ONE_POOL = "one_pool"
