"""The resident children of each sealed block, in the order of their scope and tokens.

Knows contents by number. Invariant: the child that shares the longest run of tokens with given ones stands next to them
in that order, so it is found exactly, without a look at the others.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

_RUN = 512


class Children:
    """Parent's content number to child blocks. `label` gives a block's scope root and tokens as one byte string."""

    __slots__ = ("_families", "_label")

    def __init__(self, label: Callable[[int], bytes]) -> None:
        self._label = label
        self._families: dict[int, int | _Family] = {}  # an only child stands for itself

    def __contains__(self, parent: int) -> bool:
        return parent in self._families

    def add(self, parent: int, block: int) -> None:
        """A child whose label none of its siblings has."""
        family = self._families.setdefault(parent, block)
        if isinstance(family, int):
            if family == block:
                return
            only, family = family, _Family(self._label)
            family.add(only)
            self._families[parent] = family
        family.add(block)

    def remove(self, parent: int, block: int) -> None:
        """Take out a child that was added, while its label still is what it was."""
        family = self._families[parent]
        if isinstance(family, int) or family.remove(block):
            del self._families[parent]

    def of(self, parent: int) -> list[int]:
        """All children."""
        family = self._families.get(parent, ())
        return [family] if isinstance(family, int) else list(family)

    def closest(self, parent: int, label: bytes) -> tuple[int, int] | None:
        """(child, how many leading bytes of `label` it shares), the longest such run; None without children."""
        family = self._families.get(parent)
        if family is None:
            return None
        near = [family] if isinstance(family, int) else family.neighbours(label)
        return max(((block, common_bytes(self._label(block), label)) for block in near), key=lambda pair: pair[1])


class _Family:
    """Blocks in the order of their labels, in runs of bounded length."""

    __slots__ = ("_label", "_runs")

    def __init__(self, label: Callable[[int], bytes]) -> None:
        self._label = label
        self._runs: list[list[int]] = []

    def __iter__(self) -> Iterator[int]:
        for run in self._runs:
            yield from run

    def add(self, block: int) -> None:
        if not self._runs:
            self._runs.append([block])
            return
        at, inside = self._place(self._label(block))
        if at == len(self._runs):
            at -= 1
            inside = len(self._runs[at])
        run = self._runs[at]
        run.insert(inside, block)
        if len(run) > _RUN:
            self._runs[at : at + 1] = [run[: _RUN // 2], run[_RUN // 2 :]]

    def remove(self, block: int) -> bool:
        """Whether no block is left."""
        at, inside = self._place(self._label(block))
        run = self._runs[at]
        assert run[inside] == block
        del run[inside]
        if not run:
            del self._runs[at]
        return not self._runs

    def neighbours(self, label: bytes) -> list[int]:
        """The last block before the label and the first one from it on."""
        at, inside = self._place(label)
        near = [self._runs[at][inside]] if at < len(self._runs) else []
        if inside:
            near.append(self._runs[at][inside - 1])
        elif at:
            near.append(self._runs[at - 1][-1])
        return near

    def _place(self, label: bytes) -> tuple[int, int]:
        """(run, index in it) of the first block whose label is not below this one."""
        at = bisect_left(self._runs, label, key=self._last_label)
        return at, bisect_left(self._runs[at], label, key=self._label) if at < len(self._runs) else 0

    def _last_label(self, run: list[int]) -> bytes:
        return self._label(run[-1])


def common_bytes(one: bytes, other: bytes) -> int:
    """Length of the common start of two byte strings."""
    length = min(len(one), len(other))
    difference = int.from_bytes(one[:length], "big") ^ int.from_bytes(other[:length], "big")
    return length - (difference.bit_length() + 7) // 8
