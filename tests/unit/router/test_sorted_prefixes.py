"""The binary search against a comparison with every prefix."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.sorted_prefixes import Match, SortedPrefixes


@dataclass(frozen=True)
class Value:
    rank: tuple[int, str]


def raw(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def by_hand(held: Sequence[tuple[Sequence[int], Value]], prompt: Sequence[int]) -> Match[Value] | None:
    found = [(-common(tokens, prompt), raw(tokens), value.rank, value) for tokens, value in held]
    best = min(found, default=None, key=lambda row: row[:3])
    return Match(best[3], -best[0]) if best and best[0] else None


# Few tokens, and two that differ in the highest byte only, so that prefixes share and part everywhere.
runs = st.lists(st.sampled_from([0, 1, 2, 1 << 24]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(runs, max_size=12), st.data())
def test_it_finds_what_comparing_with_every_prefix_finds(prefixes: list[list[int]], data: st.DataObject) -> None:
    ordered: SortedPrefixes[Value] = SortedPrefixes()
    held: list[tuple[list[int], Value]] = []
    ranks = data.draw(st.permutations(range(len(prefixes))))
    for number, tokens in zip(ranks, prefixes, strict=True):
        held.append((tokens, Value((number // 2, str(number)))))
        ordered.add(raw(tokens), held[-1][1])
    while True:
        assert len(ordered) == len(held)
        for prompt in (*(data.draw(runs) for _ in range(2)), *prefixes, [*([0] * 20)]):
            assert ordered.longest(raw(prompt)) == by_hand(held, prompt)
        if not held:
            return
        tokens, value = held.pop(data.draw(st.integers(0, len(held) - 1)))
        ordered.remove(raw(tokens), value)


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 4, 5]])
def test_what_is_not_there_cannot_be_removed(tokens: list[int]) -> None:
    ordered: SortedPrefixes[Value] = SortedPrefixes()
    ordered.add(raw([1, 2, 3, 4]), Value((0, "a")))
    with pytest.raises(KeyError):
        ordered.remove(raw(tokens), Value((0, "a")))
    with pytest.raises(KeyError):
        ordered.remove(raw([1, 2, 3, 4]), Value((0, "b")))
    assert ordered.longest(raw([1, 2, 3, 4])) == Match(Value((0, "a")), 4)


def test_a_look_up_compares_few_however_many_there_are() -> None:
    compared = 0

    class Counted(bytes):
        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return super().__eq__(other)

        __hash__ = bytes.__hash__

    ordered: SortedPrefixes[Value] = SortedPrefixes()
    base = list(range(4000))
    for i in range(4000):  # each parts from the prompt at another place
        ordered.add(raw([*base[:i], 5000, 1]), Value((i, "")))
    assert ordered.longest(Counted(raw(base))) == Match(Value((3999, "")), 3999)
    assert 0 < compared <= 2 * 13


def test_the_one_that_is_wholly_in_the_prompt_serves() -> None:
    ordered: SortedPrefixes[Value] = SortedPrefixes()
    for rank, tokens in enumerate(([1, 2, 9], [1, 2, 0], [1, 2], [1, 2])):
        ordered.add(raw(tokens), Value((rank, "")))
    assert ordered.longest(raw([1, 2, 5])) == Match(Value((2, "")), 2)
