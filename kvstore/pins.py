"""Published prefixes that stay: their blocks are held for a time, within their publisher's budget.

Knows no clock: time comes in as an argument. Invariant: what an owner has pinned never exceeds its quota's `pinned`,
whatever is published or however quotas change.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.quota import Owner, Quota
from kvstore.scope import Region, ScopeRoot


@dataclass(slots=True)
class _Pin:
    table: BlockTable
    owner: Owner
    until: float


class Pins:
    """The pins of one pool by name. A pinned block is referenced, so it is not evicted and not demoted."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pins: dict[str, _Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def pin(self, name: str, regions: Sequence[Region], token_ids: array[int], until: float) -> int:
        """Hold what is cached of these tokens until the time `until`; how many tokens that is: in full
        blocks, and the end of a published head.

        It replaces an earlier pin of the name. What is not cached yet, or over the budget, is left out: pin again when
        it has been computed.
        """
        before = self._pins.pop(name, None)
        owner = self._pool.account(regions[0].root)
        room = _budget(owner) - self.num_pinned(regions[0].root)
        table = BlockTable(self._pool, regions, no_store=True)
        limit = min(len(token_ids), room * self._pool.block_size)
        num_tokens = table.attach_blocks(token_ids, limit, hit=False) if limit > 0 else 0
        if limit == len(token_ids):
            num_tokens += table.attach_end(token_ids)
        if before is not None:
            self._give_back(before)  # held until now, or it might be evicted meanwhile
        if num_tokens:
            self._pool.num_holders -= 1  # a pin is no sequence: who runs beside it is alone
            self._pins[name] = _Pin(table, self._pool.account(regions[0].root), until)
        return num_tokens

    def unpin(self, name: str) -> bool:
        """Give the blocks back to the cache; whether there was such a pin."""
        pin = self._pins.pop(name, None)
        if pin is None:
            return False
        self._give_back(pin)
        return True

    def expire(self, now: float) -> int:
        """Drop pins whose time is over; how many."""
        late = [name for name, pin in self._pins.items() if pin.until <= now]
        return sum(map(self.unpin, late))

    def give_way(self) -> bool:
        """Drop the pin that would expire first: for a request that has no other way to run. False without pins."""
        if not self._pins:
            return False
        return self.unpin(min(self._pins, key=lambda name: self._pins[name].until))

    def set_quota(self, root: ScopeRoot, quota: Quota | None) -> None:
        """Set the owner's quota in the pool and drop those of its pins that its budget no longer covers."""
        self._pool.set_quota(root, quota)
        owner = self._pool.account(root)
        while self.num_pinned(root) > _budget(owner):
            mine = [name for name, pin in self._pins.items() if pin.owner is owner]
            self.unpin(min(mine, key=lambda name: self._pins[name].until))

    def num_pinned(self, root: ScopeRoot) -> int:
        """Blocks that the owner of `root` has pinned, a block that two pins hold counted twice."""
        owner = self._pool.account(root)
        return sum(len(pin.table.block_ids) for pin in self._pins.values() if pin.owner is owner)

    def drop_owner(self, root: ScopeRoot) -> int:
        """Drop all pins of the owner of `root`; how many."""
        owner = self._pool.account(root)
        return sum(map(self.unpin, [name for name, pin in self._pins.items() if pin.owner is owner]))

    def _give_back(self, pin: _Pin) -> None:
        self._pool.num_holders += 1
        pin.table.release()


def _budget(owner: Owner) -> int:
    return owner.quota.pinned if owner.quota is not None else 0
