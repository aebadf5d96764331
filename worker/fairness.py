"""The queue of a worker: who of the waiting goes next, so that owners are served in proportion to their weights.

Knows tokens and weights, no blocks and no time. Invariant: an owner that comes back from idleness brings no credit with
it and loses no debt, so the service of two owners differs by their weights and a bounded rest while both want any; and
no owner fills a bounded queue so that another one has no place in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from heapq import heapify, heappop, heapreplace

from kvstore.scope import ScopeRoot
from worker.sequence import Sequence, SequenceRequest

PROMPT_TOKEN = 1.0
GENERATED_TOKEN = 2.0
"""Service, in units of a computed prompt token. A generated one takes a pass over the weights of its own."""


class _Owner:
    """`service` is what it had, over its weight; `active` counts its sequences, `waiting` holds those in the queue."""

    __slots__ = ("active", "service", "waiting", "weight")

    def __init__(self) -> None:
        self.active = 0
        self.service = 0.0
        self.waiting: list[Sequence] = []  # by Sequence.order
        self.weight = 1


class FairQueue:
    """Waiting sequences of all owners. Priority orders those of one owner; between owners only service counts."""

    def __init__(self) -> None:
        self._owners: dict[ScopeRoot, _Owner] = {}
        self._waiting = 0
        self._num_active = 0  # of the owners; the others have had more than who had least, when last anyone came
        self._passed = 0.0  # the most service that anyone had, when last nobody was active

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        """The waiting, least served owners first. What was yielded may be removed and its owner served meanwhile."""
        heap = [
            (owner.service, owner.waiting[0].arrival, owner, owner.waiting[0])
            for owner in self._owners.values()
            if owner.waiting
        ]
        heapify(heap)
        while heap:
            _, _, owner, sequence = heap[0]
            yield sequence
            at = bisect_right(owner.waiting, sequence.order, key=_order)
            if at < len(owner.waiting):
                heapreplace(heap, (owner.service, owner.waiting[at].arrival, owner, owner.waiting[at]))
            else:
                heappop(heap)

    def enter(self, sequence: Sequence) -> None:
        """A sequence is here, waiting or running, until it `leave`s."""
        owner = self._owners.setdefault(sequence.request.owner, _Owner())
        if not owner.active:
            least = self._least()
            self._owners = {root: one for root, one in self._owners.items() if one.active or one.service > least}
            self._owners[sequence.request.owner] = owner
            owner.service = max(owner.service, least)
            self._num_active += 1
        owner.active += 1
        owner.weight = sequence.request.weight

    def leave(self, sequence: Sequence) -> None:
        """It has ended."""
        owner = self._owners[sequence.request.owner]
        owner.active -= 1
        self._num_active -= not owner.active
        if not self._num_active:
            self._passed = max(one.service for one in self._owners.values())
            self._owners.clear()

    def add(self, sequence: Sequence) -> None:
        """It waits from now on."""
        insort(self._owners[sequence.request.owner].waiting, sequence, key=_order)
        self._waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """It waits no more; nothing happens if it did not."""
        waiting = self._owners[sequence.request.owner].waiting
        at = bisect_left(waiting, sequence.order, key=_order)
        if at < len(waiting) and waiting[at] is sequence:
            del waiting[at]
            self._waiting -= 1

    def gives_way(self, newcomer: SequenceRequest) -> Sequence | None:
        """Who leaves a full queue for `newcomer`: the newest of the owner with most places for its weight; None where
        the newcomer's own would have more for its weight then. Whoever has no place gets one from whoever has two.

        Only one of which nothing was said or begun gives way, so that its router can send it elsewhere.
        """
        own = self._owners.get(newcomer.owner)
        places = len(own.waiting) if own is not None else 0
        others = [owner for owner in self._owners.values() if owner is not own and len(owner.waiting) > 1]
        if not others:
            return None
        crowd = max(others, key=lambda owner: len(owner.waiting) / owner.weight)
        if places and (places + 1) / newcomer.weight > (len(crowd.waiting) - 1) / crowd.weight:
            return None
        return next((sequence for sequence in reversed(crowd.waiting) if sequence.is_untouched), None)

    def serve(self, sequence: Sequence, *, prompt_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Book what was computed for it."""
        owner = self._owners[sequence.request.owner]
        service = PROMPT_TOKEN * prompt_tokens + GENERATED_TOKEN * generated_tokens
        owner.service += service / owner.weight

    def clear(self) -> None:
        """Forget everyone."""
        self._owners.clear()
        self._waiting = self._num_active = 0

    def _least(self) -> float:
        return min((owner.service for owner in self._owners.values() if owner.active), default=self._passed)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
