"""A radix tree over token ids: which of many prefixes has the longest run in common with a prompt.

Knows tokens and opaque values. Invariant: an answer is what a comparison with every prefix would give, ties going to
the lowest rank; what it costs depends on the prompt and on how often prefixes part along it, not on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

TOKEN_BYTES = 4


class Ranked(Protocol):
    """A value of the tree: `rank` orders those that match equally long, and is unique."""

    @property
    def rank(self) -> tuple[int, str]: ...


V = TypeVar("V", bound=Ranked)


class Match(NamedTuple, Generic[V]):
    """The best value, and how many tokens it and the prompt have in common."""

    value: V
    num_tokens: int


class _Node(Generic[V]):
    """`edge`: the token bytes from the parent to here. `best`: the lowest rank at and below this node."""

    __slots__ = ("best", "children", "edge", "values")

    def __init__(self, edge: bytes) -> None:
        self.edge = edge
        self.children: dict[bytes, Self] = {}
        self.values: list[V] = []
        self.best: V | None = None

    def choose(self) -> None:
        """Set `best` from the values here and the children's."""
        below = (child.best for child in self.children.values())
        self.best = min((value for value in (*self.values, *below) if value is not None), key=_rank, default=None)


class PrefixTree(Generic[V]):
    """Prefixes of token ids as little-endian u32, each with a value; equal prefixes may have several."""

    def __init__(self) -> None:
        self._root: _Node[V] = _Node(b"")
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, tokens: bytes, value: V) -> None:
        """Add a prefix of at least one token."""
        node, at = self._root, 0
        path = [node]
        while at < len(tokens):
            child = node.children.get(tokens[at : at + TOKEN_BYTES])
            if child is None:
                child = _Node(tokens[at:])
                node.children[child.edge[:TOKEN_BYTES]] = child
            elif (common := _common(child.edge, tokens, at)) < len(child.edge):
                child = _split(node, child, common)
            node, at = child, at + len(child.edge)
            path.append(node)
        node.values.append(value)
        for node in path:
            if node.best is None or value.rank < node.best.rank:
                node.best = value
        self._size += 1

    def remove(self, tokens: bytes, value: V) -> None:
        """Take out what `add` put in; KeyError if it is not there."""
        path = list(self._path(tokens))
        node = path[-1]
        if sum(len(step.edge) for step in path) != len(tokens) or value not in node.values:
            raise KeyError("no such prefix")
        node.values.remove(value)
        for parent, child in zip(path[-2::-1], path[:0:-1], strict=True):
            if not child.values and len(child.children) <= 1:
                _bridge(parent, child)
            child.choose()
            parent.choose()
        self._size -= 1

    def longest(self, prompt: bytes) -> Match[V] | None:
        """The value whose prefix has the most leading tokens in common with `prompt`; None if none has any."""
        node, at = self._root, 0
        while True:
            child = node.children.get(prompt[at : at + TOKEN_BYTES])
            if child is None:
                break
            common = _common(child.edge, prompt, at)
            node, at = child, at + common
            if common < len(child.edge):
                break
        return Match(node.best, at // TOKEN_BYTES) if at and node.best is not None else None

    def _path(self, tokens: bytes) -> Iterator[_Node[V]]:
        """The nodes from the root as far as whole edges lead along `tokens`."""
        node, at = self._root, 0
        yield node
        while at < len(tokens):
            child = node.children.get(tokens[at : at + TOKEN_BYTES])
            if child is None or not tokens.startswith(child.edge, at):
                return
            node, at = child, at + len(child.edge)
            yield node


def _split(parent: _Node[V], child: _Node[V], common: int) -> _Node[V]:
    """Put a node between the two, `common` bytes down the child's edge."""
    middle: _Node[V] = _Node(child.edge[:common])
    middle.best = child.best
    child.edge = child.edge[common:]
    middle.children[child.edge[:TOKEN_BYTES]] = child
    parent.children[middle.edge[:TOKEN_BYTES]] = middle
    return middle


def _bridge(parent: _Node[V], child: _Node[V]) -> None:
    """Take a node out that has no value and at most one child."""
    del parent.children[child.edge[:TOKEN_BYTES]]
    for only in child.children.values():
        only.edge = child.edge + only.edge
        parent.children[only.edge[:TOKEN_BYTES]] = only


def _common(edge: bytes, tokens: bytes, at: int) -> int:
    """How many bytes of `edge` stand in `tokens` from `at` on, in whole tokens."""
    if tokens.startswith(edge, at):
        return len(edge)
    low, high = 0, min(len(edge), len(tokens) - at) // TOKEN_BYTES
    while low < high:  # the first `low` tokens are equal, more than `high` are not
        half = (low + high + 1) // 2
        if tokens.startswith(edge[: half * TOKEN_BYTES], at):
            low = half
        else:
            high = half - 1
    return low * TOKEN_BYTES


def _rank(value: Ranked) -> tuple[int, str]:
    return value.rank
