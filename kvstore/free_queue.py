"""The queue of unreferenced blocks in eviction order, as a linked list in two flat arrays.

Knows nothing of what a block holds. Invariant: every operation touches a fixed number of links per block.

    head -> next to be taken ... -> taken last -> head        (the head is entry num_blocks of both arrays)
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class FreeQueue:
    """A doubly linked ring over block ids 0..num_blocks-1. Callers know which ids are in it."""

    __slots__ = ("_head", "_next", "_previous")

    def __init__(self, num_blocks: int) -> None:
        """Starts with every block in it, in order of id."""
        self._head = num_blocks
        self._next = array("i", range(1, num_blocks + 1))
        self._next.append(0)
        self._previous = array("i", (num_blocks,))
        self._previous.extend(range(num_blocks))

    def push_back(self, block: int) -> None:
        """To be taken after all that are in the queue."""
        following, previous, head = self._next, self._previous, self._head
        last = previous[head]
        following[last] = block
        previous[block] = last
        following[block] = head
        previous[head] = block

    def push_front(self, block: int) -> None:
        """To be taken before all that are in the queue."""
        following, previous, head = self._next, self._previous, self._head
        first = following[head]
        previous[first] = block
        following[block] = first
        previous[block] = head
        following[head] = block

    def remove(self, block: int) -> None:
        """Take this block out, wherever it stands."""
        before, after = self._previous[block], self._next[block]
        self._next[before] = after
        self._previous[after] = before

    def pop_front(self, count: int) -> list[int]:
        """Take the next `count` blocks; the caller knows that there are as many."""
        following, head = self._next, self._head
        taken: list[int] = []
        block = head
        for _ in range(count):
            block = following[block]
            taken.append(block)
        if taken:
            first = following[block]
            following[head] = first
            self._previous[first] = head
        return taken

    def __iter__(self) -> Iterator[int]:
        following, head = self._next, self._head
        block = following[head]
        while block != head:
            yield block
            block = following[block]
