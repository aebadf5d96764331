"""Prefixes of token ids in sorted order: which of many has the longest run in common with a prompt.

Knows tokens and opaque values. Invariant: an answer is what a comparison with every prefix would give. Whatever begins
alike stands together, so the longest run is found at the place where the prompt would stand: a binary search.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

TOKEN_BYTES = 4

Rank = tuple[int, str]


class Ranked(Protocol):
    """A value: `rank` orders those whose prefixes are equal, and is unique."""

    @property
    def rank(self) -> Rank: ...


V = TypeVar("V", bound=Ranked)


class Match(NamedTuple, Generic[V]):
    """The value found, and how many tokens its prefix and the prompt have in common."""

    value: V
    num_tokens: int


class SortedPrefixes(Generic[V]):
    """Prefixes as little-endian u32, each with a value; equal prefixes may have several."""

    def __init__(self) -> None:
        self._rows: list[tuple[bytes, Rank, V]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, tokens: bytes, value: V) -> None:
        """Add a prefix of at least one token."""
        insort(self._rows, (tokens, value.rank, value))

    def remove(self, tokens: bytes, value: V) -> None:
        """Take out what `add` put in; KeyError if it is not there."""
        at = self._place((tokens, value.rank))
        if at == len(self._rows) or self._rows[at][:2] != (tokens, value.rank):
            raise KeyError("no such prefix")
        del self._rows[at]

    def longest(self, prompt: bytes) -> Match[V] | None:
        """The prefix that has the most leading tokens in common with `prompt`; None if none has any.

        Of equals the shortest that is wholly in the prompt, if there is one, then the lowest rank; else the first in
        the order of the tokens.
        """
        at = self._place((prompt,))
        common = max((_common(row[0], prompt) for row in self._rows[max(0, at - 1) : at + 1]), default=0)
        if not common:
            return None
        _, _, value = self._rows[self._place((prompt[:common],))]
        return Match(value, common // TOKEN_BYTES)

    def _place(self, row: Any) -> int:
        """Where the first row stands that is not before this one, which may be cut short."""
        return bisect_left(self._rows, row)


def _common(one: bytes, other: bytes) -> int:
    """How many leading bytes are equal, in whole tokens."""
    low, high = 0, min(len(one), len(other)) // TOKEN_BYTES
    while low < high:  # the first `low` tokens are equal, more than `high` are not
        half = (low + high + 1) // 2
        if one.startswith(other[low * TOKEN_BYTES : half * TOKEN_BYTES], low * TOKEN_BYTES):
            low = half
        else:
            high = half - 1
    return low * TOKEN_BYTES
