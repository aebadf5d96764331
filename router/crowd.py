"""Whose requests this router has at one worker, who of them waits, and who may still ask there when it is full.

Knows owners and weights as the worker does, who alone decides and also sees the other routers' requests. Invariant: an
owner with fewer than its part of the places by weight is let through, unless the worker has just refused it.
"""

from __future__ import annotations

from kvstore.scope import ScopeRoot
from router.lines import Line, Owner, Waiting, owner_of


class Crowd:
    """`said` is the number of the worker's load report: a refusal holds until the next one."""

    __slots__ = ("_refused", "_there", "_waiting", "_weights")

    def __init__(self) -> None:
        self._there: dict[ScopeRoot, int] = {}
        self._waiting: dict[Owner, Waiting] = {}
        self._weights: dict[ScopeRoot, int] = {}
        self._refused: dict[ScopeRoot, int] = {}

    @property
    def line(self) -> Line:
        """Those who wait."""
        return self._waiting.copy()

    def enter(self, owner: ScopeRoot, weight: int, count: int, tokens: int) -> None:
        """So many more sequences of this owner are there; they wait, with so many tokens."""
        told = owner_of(owner)
        waiting = self._waiting.get(told)
        self._waiting[told] = (weight, tokens if waiting is None else tokens + waiting[1])
        self._there[owner] = self._there.get(owner, 0) + count
        self._weights[owner] = weight

    def begin(self, owner: ScopeRoot, tokens: int) -> None:
        """So many of its tokens wait no more."""
        told = owner_of(owner)
        weight, waiting = self._waiting.pop(told)
        if waiting > tokens:
            self._waiting[told] = (weight, waiting - tokens)

    def leave(self, owner: ScopeRoot, count: int) -> None:
        """So many have ended."""
        self._there[owner] -= count
        if not self._there[owner]:
            del self._there[owner], self._weights[owner]

    def note_refused(self, owner: ScopeRoot, said: int) -> None:
        """The worker had no place for this owner."""
        if self._refused and said not in self._refused.values():
            self._refused.clear()
        self._refused[owner] = said

    def may_ask(self, owner: ScopeRoot, weight: int, places: int, said: int) -> bool:
        """Whether to try, at a worker all of whose `places` are taken."""
        if self._refused.get(owner) == said:
            return False
        others = sum(self._weights.values()) - self._weights.get(owner, 0)
        return self._there.get(owner, 0) * (others + weight) < places * weight
