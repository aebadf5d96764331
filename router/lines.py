"""Who waits at each worker, and how much of a queue is ahead of one owner's next request: columns, kept up by row.

A worker serves those who wait by their weights, so whoever has little there is served long before the end of the queue.
Knows no member and no prompt. Invariant: of an owner that waits alone everywhere, all of a queue is ahead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NewType

import numpy as np
from numpy.typing import NDArray

from kvstore.scope import ScopeRoot

Floats = NDArray[np.float64]
Owner = NewType("Owner", bytes)
"""Stands for a scope root where others can read it: from a root itself they could make keys, and so try prompts."""
_OWNER_BYTES = 8
Waiting = tuple[int, int]
"""An owner's weight, and the tokens of prompts and answers that a worker may yet compute for what waits of it."""
Line = Mapping[Owner, Waiting]
"""All who wait at one worker."""
NOBODY_WAITS: Line = MappingProxyType({})


@lru_cache(maxsize=4096)
def owner_of(root: ScopeRoot) -> Owner:
    """In every router the same."""
    return Owner(hashlib.blake2b(root, digest_size=_OWNER_BYTES, person=b"pando.owner").digest())


def joined(one: Line, other: Line) -> Line:
    """Both together."""
    if not one or not other:
        return one or other
    line = dict(one)
    for owner, (weight, tokens) in other.items():
        there = line.get(owner)
        line[owner] = (weight, tokens if there is None else there[1] + tokens)
    return line


def ahead(line: Line, owner: Owner, weight: int, tokens: float) -> float:
    """Of one queue the part that is served before a new request of `tokens` ends: with each of the owner's tokens go
    those of the others by weight, until there are none left. Between 0 and 1."""
    total, weights, mine = tokens, 0, tokens
    for one, (its_weight, its_tokens) in line.items():
        total, weights = total + its_tokens, weights + its_weight
        mine += its_tokens if one == owner else 0
    weights += 0 if owner in line else weight
    return min(1.0, mine * weights / (weight * total))


class Lines:
    """For so many workers. Columns are written when they are asked for: never, while one owner is the only one."""

    def __init__(self, size: int) -> None:
        self._lines: list[Line] = [{} for _ in range(size)]
        self._rows_of: dict[Owner, int] = {}
        self._stale: set[int] = set()
        self._tokens: dict[Owner, Floats] = {}
        self._away: dict[Owner, Floats] = {}  # an owner's weight, where it has nothing waiting
        self._total, self._weights = np.zeros((2, size))

    def write(self, row: int, line: Line) -> None:
        """These wait at a worker now."""
        before = self._lines[row]
        if line == before:
            return
        self._lines[row] = line
        self._stale.add(row)
        for owner in line:
            if owner not in before:
                self._rows_of[owner] = self._rows_of.get(owner, 0) + 1
        for owner in before:
            if owner in line:
                continue
            self._rows_of[owner] -= 1
            if owner in self._tokens:
                self._tokens[owner][row], self._away[owner][row] = 0.0, before[owner][0]
            if not self._rows_of[owner]:
                for column in (self._rows_of, self._tokens, self._away):
                    column.pop(owner, None)

    def has_others(self, owner: Owner) -> bool:
        """Whether anybody else waits anywhere; if not, all of each queue is ahead."""
        return len(self._rows_of) > (owner in self._rows_of)

    def ahead(self, owner: Owner, weight: int, tokens: Floats) -> Floats:
        """`ahead` at each worker, for a request of so many tokens there."""
        self._catch_up()
        own = self._tokens.get(owner)
        # In place: each step on a column costs about as much as to make one.
        if own is None:
            part, weights = tokens.copy(), self._weights + weight
        else:
            part, weights = own + tokens, self._weights + self._away[owner]
        whole = self._total + tokens
        whole *= weight
        part *= weights
        part /= whole
        return np.minimum(part, 1.0, out=part)

    def _catch_up(self) -> None:
        for row in self._stale:
            total = weights = 0
            for owner, (weight, tokens) in self._lines[row].items():
                if owner not in self._tokens:
                    self._tokens[owner] = np.zeros_like(self._total)
                    self._away[owner] = np.full_like(self._total, weight)
                self._tokens[owner][row], self._away[owner][row] = tokens, 0.0
                total, weights = total + tokens, weights + weight
            self._total[row], self._weights[row] = total, weights
        self._stale.clear()
