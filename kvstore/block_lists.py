"""Doubly linked lists over block ids, in two flat arrays.

Knows nothing of what a block holds. Invariant: a block stands in one list at most, and every operation touches a fixed
number of links.

    head -> first ... -> last -> head        (a list is named by its head, an entry behind those of the blocks)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

_OUT = -1


class BlockLists:
    """Any number of lists over blocks 0..num_blocks-1."""

    __slots__ = ("_next", "_previous", "_unused")

    def __init__(self, num_blocks: int) -> None:
        self._next = array("i", (_OUT,)) * num_blocks
        self._previous = array("i", (_OUT,)) * num_blocks
        self._unused: list[int] = []

    def add_list(self) -> int:
        """A new, empty list; the result names it."""
        if self._unused:
            return self._unused.pop()
        head = len(self._next)
        self._next.append(head)
        self._previous.append(head)
        return head

    def drop_list(self, head: int) -> None:
        """Forget a list; its blocks stand in no list any more."""
        for block in list(self.iterate(head)):
            self.remove(block)
        self._unused.append(head)

    def push_back(self, head: int, block: int) -> None:
        """Put a block that stands in no list behind all others of this one."""
        following, previous = self._next, self._previous
        last = previous[head]
        following[last] = block
        previous[block] = last
        following[block] = head
        previous[head] = block

    def push_front(self, head: int, block: int) -> None:
        """Put a block that stands in no list before all others of this one."""
        following, previous = self._next, self._previous
        first = following[head]
        previous[first] = block
        following[block] = first
        previous[block] = head
        following[head] = block

    def remove(self, block: int) -> None:
        """Take a block out of the list it stands in."""
        following, previous = self._next, self._previous
        before, after = previous[block], following[block]
        following[before] = after
        previous[after] = before
        following[block] = _OUT

    def first(self, head: int) -> int | None:
        """The first block of a list, None if it is empty."""
        block = self._next[head]
        return None if block == head else block

    def __contains__(self, block: int) -> bool:
        return self._next[block] != _OUT

    def iterate(self, head: int) -> Iterator[int]:
        """The blocks of a list in order; the list must not change meanwhile."""
        following = self._next
        block = following[head]
        while block != head:
            yield block
            block = following[block]
