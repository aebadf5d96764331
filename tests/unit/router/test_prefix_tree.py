"""The radix tree against a comparison with every prefix."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.prefix_tree import Match, PrefixTree


@dataclass(frozen=True)
class Value:
    rank: tuple[int, str]


def raw(tokens: Sequence[int]) -> bytes:
    return array("I", tokens).tobytes()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def by_hand(held: Sequence[tuple[Sequence[int], Value]], prompt: Sequence[int]) -> Match[Value] | None:
    found = [(-common(tokens, prompt), value.rank, value) for tokens, value in held]
    best = min(found, default=None, key=lambda row: row[:2])
    return Match(best[2], -best[0]) if best and best[0] else None


# Few tokens, and two that differ in the highest byte only, so that prefixes share and part everywhere.
runs = st.lists(st.sampled_from([0, 1, 2, 1 << 24]), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(runs, max_size=12), st.data())
def test_the_tree_finds_what_comparing_with_every_prefix_finds(prefixes: list[list[int]], data: st.DataObject) -> None:
    tree: PrefixTree[Value] = PrefixTree()
    held: list[tuple[list[int], Value]] = []
    ranks = data.draw(st.permutations(range(len(prefixes))))
    for number, tokens in zip(ranks, prefixes, strict=True):
        held.append((tokens, Value((number // 2, str(number)))))
        tree.add(raw(tokens), held[-1][1])
    while True:
        assert len(tree) == len(held)
        for prompt in (*(data.draw(runs) for _ in range(2)), *prefixes, [*([0] * 20)]):
            assert tree.longest(raw(prompt)) == by_hand(held, prompt)
        if not held:
            return
        tokens, value = held.pop(data.draw(st.integers(0, len(held) - 1)))
        tree.remove(raw(tokens), value)


def test_an_emptied_tree_holds_no_node() -> None:
    tree: PrefixTree[Value] = PrefixTree()
    prefixes = [[1] * 9, [1] * 4, [1, 1, 2], [3], [1] * 4]
    values = [Value((0, str(i))) for i in range(len(prefixes))]
    for tokens, value in zip(prefixes, values, strict=True):
        tree.add(raw(tokens), value)
    for tokens, value in zip(prefixes, values, strict=True):
        tree.remove(raw(tokens), value)
    assert len(tree) == 0 and not tree._root.children and tree.longest(raw([1, 1])) is None


@pytest.mark.parametrize("tokens", [[1], [1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 4, 5]])
def test_what_is_not_there_cannot_be_removed(tokens: list[int]) -> None:
    tree: PrefixTree[Value] = PrefixTree()
    tree.add(raw([1, 2, 3, 4]), Value((0, "a")))
    with pytest.raises(KeyError):
        tree.remove(raw(tokens), Value((0, "a")))
    with pytest.raises(KeyError):
        tree.remove(raw([1, 2, 3, 4]), Value((0, "b")))
    assert tree.longest(raw([1, 2, 3, 4])) == Match(Value((0, "a")), 4)


def test_what_a_look_up_touches_does_not_grow_with_the_number_of_prefixes() -> None:
    """Counted in nodes, for a prompt that one of them begins."""

    def depth(count: int) -> int:
        tree: PrefixTree[Value] = PrefixTree()
        for i in range(count):
            tree.add(raw([7, i, *range(200)]), Value((i, "")))
        assert tree.longest(raw([7, 3, *range(500)])) == Match(Value((3, "")), 202)
        return len(list(tree._path(raw([7, 3, *range(200)]))))

    assert depth(10) == depth(3000) == 3
