"""Which cached block goes next: by policy, leaves first, owners over their floor before the others.

Knows blocks, their owners and whether they are busy; nothing of tensors. Invariants: a block with a resident child, a
holder or a transfer is never chosen, and each operation moves a fixed number of links, a block's later return to the
lists included.

                 2nd hit                            all cached blocks stand in the probation or the protected list;
    probation ------------> protected               those of an owner with a quota also in its own two, same order
        ^   ^--- overflow ------'                   busy at the front -> parked, back to the front when no longer busy
        '--- released                               within its floor at the front -> sheltered: in its own lists only
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain, islice

from kvstore.block import BlockId, BrokenInvariant
from kvstore.block_lists import BlockLists
from kvstore.contents import Contents
from kvstore.quota import Owner

SLRU, LRU, FIFO = "slru", "lru", "fifo"
POLICIES = (SLRU, LRU, FIFO)
PROTECTING_HITS = 2
PROTECTED_SHARE = 0.8


class EvictionOrder:
    """The cached blocks of one pool. `references` and `owners` are the pool's own, by block.

    `slru`: a block found twice by others is protected from those found less often, a scan of new prompts passes it by.
    `lru`: the longest unused goes first. `fifo`: the longest sealed goes first, used or not.
    """

    def __init__(self, policy: str, contents: Contents, references: array[int], owners: list[Owner | None]) -> None:
        if policy not in POLICIES:
            raise ValueError(f"an eviction policy is one of {', '.join(POLICIES)}")
        num_blocks = len(references)
        self.policy = policy
        self._contents = contents
        self._references = references
        self._owners = owners
        self._lists = BlockLists(num_blocks)
        self._segments = (self._lists.add_list(), self._lists.add_list())
        self._own = BlockLists(num_blocks)
        self._hits = bytearray(num_blocks)
        self._num_protected = 0
        self._max_protected = int(num_blocks * PROTECTED_SHARE)
        self._parked: dict[int, int] = {}  # content number -> block
        self._sheltering: dict[Owner, None] = {}
        self._exposed: dict[Owner, None] = {}
        self._in_transfer: set[int] = set()

    # What happens to blocks

    def sealed(self, block: int) -> None:
        """The block, which is held, can now be found."""
        self._hits[block] = 0
        if self.policy == FIFO:
            self._enter(block)

    def hit(self, block: int) -> None:
        """The block was found by a sequence."""
        if self._hits[block] < PROTECTING_HITS:
            self._hits[block] += 1

    def add(self, block: int) -> None:
        """Nobody holds the block any more."""
        if self.policy == FIFO:
            self._unpark(self._contents.numbers[block])
        else:
            self._enter(block)

    def remove(self, block: int) -> None:
        """Somebody holds the block again."""
        if self.policy != FIFO:
            self.erase(block)

    def erase(self, block: int) -> None:
        """The block leaves the order: it is held, or about to lose its content."""
        if self._parked and self._parked.pop(self._contents.numbers[block], None) is not None:
            return
        if block in self._lists:
            self._lists.remove(block)
            self._num_protected -= self._segment(block)
        elif block in self._own:
            owner = self._owner(block)
            owner.sheltered -= 1
            self.refresh(owner)
        if block in self._own:
            self._own.remove(block)

    def forgotten(self, block: int, parent: int) -> None:
        """The block, which stands in the order no more, has lost its content, a child of `parent`."""
        self._in_transfer.discard(block)
        if parent not in self._contents.children:
            self._unpark(parent)

    def begin_transfer(self, block: int) -> None:
        """The block is being read: others go first."""
        self._in_transfer.add(block)

    def end_transfer(self, block: int) -> None:
        """The block is no longer being read."""
        self._in_transfer.discard(block)
        self._unpark(self._contents.numbers[block])

    # The choice

    def take(self) -> int | None:
        """Take the next block out. None if each cached one has a child in use, which cannot be on a device."""
        block = self._next()
        if block is None and self._in_transfer:
            # Only what is in transfer is left, and what stands above it: the transfers lose their claim.
            self._in_transfer.clear()
            for number in list(self._parked):
                self._unpark(number)
            block = self._next()
        if block is not None:
            self.erase(block)
        return block

    def take_of(self, owner: Owner) -> int | None:
        """Take the next block of an owner that has a quota; None if it has no leaf."""
        block = self._next_of(owner)
        if block is not None:
            self.erase(block)
        return block

    def upcoming(self, count: int) -> list[BlockId]:
        """The cached blocks that go next, as far as that is known without asking their owners."""
        lists = self._lists
        sheltered = chain.from_iterable(self._own.iterate(head) for owner in self._exposed for head in owner.lists)
        ahead: Iterator[int] = chain(sheltered, *(lists.iterate(head) for head in self._segments))
        return [BlockId(block) for block in islice(ahead, count) if not self._references[block]]

    def _next(self) -> int | None:
        while self._exposed:
            block = self._next_of(next(iter(self._exposed)))
            if block is not None:
                return block
        for head in self._segments:
            while (first := self._lists.first(head)) is not None:
                if self._busy(first):
                    self._park(first)
                elif self._is_within_floor(first):
                    self._shelter(first)
                else:
                    return first
        for owner in list(self._sheltering):
            block = self._next_of(owner)
            if block is not None:
                return block
        return None

    def _next_of(self, owner: Owner) -> int | None:
        for head in owner.lists:
            while (first := self._own.first(head)) is not None:
                if not self._busy(first):
                    return first
                self._park(first)
        return None

    def _busy(self, block: int) -> bool:
        return (
            self._contents.numbers[block] in self._contents.children
            or self._references[block] != 0
            or block in self._in_transfer
        )

    # Places

    def _segment(self, block: int) -> int:
        return int(self.policy == SLRU and self._hits[block] >= PROTECTING_HITS)

    def _enter(self, block: int, *, at_front: bool = False) -> None:
        segment = self._segment(block)
        push = BlockLists.push_front if at_front else BlockLists.push_back
        push(self._lists, self._segments[segment], block)
        owner = self._owner(block)
        if owner.lists:
            push(self._own, owner.lists[segment], block)
        if segment:
            self._num_protected += 1
            if self._num_protected > self._max_protected:
                self._demote()

    def _demote(self) -> None:
        """The protected block that was unused longest has to be found again."""
        block = self._lists.first(self._segments[1])
        assert block is not None
        self.erase(block)
        self._hits[block] = PROTECTING_HITS - 1
        self._enter(block)

    def _park(self, block: int) -> None:
        self.erase(block)
        self._parked[self._contents.numbers[block]] = block

    def _unpark(self, number: int) -> None:
        block = self._parked.pop(number, None)
        if block is not None:
            self._enter(block, at_front=True)

    # Owners

    def _owner(self, block: int) -> Owner:
        owner = self._owners[block]
        assert owner is not None
        return owner

    def _is_within_floor(self, block: int) -> bool:
        owner = self._owner(block)
        return owner.charge <= owner.floor

    def _shelter(self, block: int) -> None:
        self._lists.remove(block)
        self._num_protected -= self._segment(block)
        owner = self._owner(block)
        owner.sheltered += 1
        self.refresh(owner)

    def refresh(self, owner: Owner) -> None:
        """The owner's charge has changed, or how many of its blocks are sheltered."""
        if not owner.sheltered:
            self._sheltering.pop(owner, None)
            self._exposed.pop(owner, None)
            return
        self._sheltering[owner] = None
        if owner.charge > owner.floor:
            self._exposed[owner] = None
        else:
            self._exposed.pop(owner, None)

    def enlist(self, owner: Owner) -> None:
        """The owner's quota was set or dropped: give it lists of its own, or take them away. A scan."""
        blocks = [block for block, other in enumerate(self._owners) if other is owner]
        placed = [block for segment in self._segments for block in self._lists.iterate(segment)]
        sheltered = [block for head in owner.lists for block in self._own.iterate(head) if block not in self._lists]
        for block in reversed(sheltered):
            self.erase(block)
            self._enter(block, at_front=True)
        if owner.lists and owner.quota is None:
            for head in owner.lists:
                self._own.drop_list(head)
            owner.lists = ()
        elif not owner.lists and owner.quota is not None:
            owner.lists = (self._own.add_list(), self._own.add_list())
            mine = set(blocks)
            for block in placed:
                if block in mine:
                    self._own.push_back(owner.lists[self._segment(block)], block)
        self.refresh(owner)

    def check(self, cached: set[int]) -> None:
        """Raise BrokenInvariant unless exactly the cached blocks can be chosen some time."""
        listed = [block for segment in self._segments for block in self._lists.iterate(segment)]
        own = [
            block for owner in set(self._owners) if owner for head in owner.lists for block in self._own.iterate(head)
        ]
        places = [*listed, *(block for block in own if block not in self._lists), *self._parked.values()]
        known = {block for block in places if not self._references[block]}
        if known != cached or len(set(places)) != len(places):
            raise BrokenInvariant("the eviction order has lost or doubled a block")
        if sum(map(self._segment, self._lists.iterate(self._segments[1]))) != self._num_protected:
            raise BrokenInvariant("the count of protected blocks is wrong")
        if any(self._owners[block] and not self._busy(block) for block in self._parked.values()):
            raise BrokenInvariant("a block that could be evicted is parked")
