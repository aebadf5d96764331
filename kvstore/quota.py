"""Who is charged for which block, and how many blocks an owner may hold: floors, ceilings, budgets for pins.

Knows owners by the root of a scope and never by name. Invariants: the charges sum to the blocks that are not free, and
held blocks and the unmet floors together fit the pool, so an owner under its floor can always grow to it. The one
exception is a lone holder: what nobody else uses it may use, or a request longer than the spare room would never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.scope import ScopeRoot


@dataclass(frozen=True, slots=True)
class Quota:
    """Blocks of one tier. `floor` is always the owner's own: as room to hold blocks, and as cache that others do not
    evict. Above `ceiling` it keeps nothing that is not in use; None is no ceiling. `pinned` bounds its pins."""

    floor: int = 0
    ceiling: int | None = None
    pinned: int = 0

    def __post_init__(self) -> None:
        if self.floor < 0 or self.pinned < 0 or (self.ceiling is not None and self.ceiling < self.floor):
            raise ValueError("a quota needs 0 <= floor <= ceiling and 0 <= pinned")


class Owner:
    """An account. `charge` counts all blocks that stand for it, `held` those of them that somebody references."""

    __slots__ = ("charge", "held", "lists", "quota", "root", "sheltered")

    def __init__(self, root: ScopeRoot | None) -> None:
        self.root = root
        self.charge = 0
        self.held = 0
        self.quota: Quota | None = None
        self.lists: tuple[int, ...] = ()
        """Where eviction keeps its cached blocks, if it has a quota; and how many of them stand nowhere else."""
        self.sheltered = 0

    @property
    def floor(self) -> int:
        return self.quota.floor if self.quota is not None else 0

    @property
    def excess(self) -> int:
        """Blocks over the ceiling."""
        if self.quota is None or self.quota.ceiling is None:
            return 0
        return max(0, self.charge - self.quota.ceiling)


class Ledger:
    """All accounts of one pool. An owner without quota and charge is forgotten."""

    __slots__ = ("_floors", "_num_blocks", "_owners", "_publishers", "num_held", "over", "unmet")

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._floors = 0
        self._owners: dict[ScopeRoot | None, Owner] = {}
        self._publishers: dict[ScopeRoot, ScopeRoot] = {}
        self.num_held = 0
        self.unmet = 0
        """What owners could still hold under their floors, summed."""
        self.over: dict[Owner, None] = {}
        """Owners that may be over their ceilings."""

    def owner(self, root: ScopeRoot | None) -> Owner:
        """The account that is charged for blocks of this scope."""
        if self._publishers and root is not None:
            root = self._publishers.get(root, root)
        owner = self._owners.get(root)
        if owner is None:
            owner = self._owners[root] = Owner(root)
        return owner

    def account(self, root: ScopeRoot | None) -> Owner:
        """The same, to be read only: one that has nothing is not opened."""
        root = self._publishers.get(root, root) if root is not None else None
        return self._owners.get(root) or Owner(root)

    def owners(self) -> list[Owner]:
        """All accounts."""
        return list(self._owners.values())

    def set_publisher(self, root: ScopeRoot, publisher: ScopeRoot) -> None:
        """Charge blocks of the scope `root` to `publisher` from now on."""
        self._publishers[root] = publisher

    def set_quota(self, root: ScopeRoot, quota: Quota | None) -> Owner:
        """Replace an account's quota; ValueError if the floors no longer fit the pool."""
        owner = self.owner(root)
        floors = self._floors - owner.floor + (quota.floor if quota else 0)
        if floors > self._num_blocks:
            raise ValueError("the floors are more than the pool")
        self._floors = floors
        self.unmet -= max(0, owner.floor - owner.held)
        owner.quota = quota
        self.unmet += max(0, owner.floor - owner.held)
        self.forget_if_empty(owner)
        return owner

    def hold(self, owner: Owner, count: int) -> None:
        """So many more of the owner's blocks are referenced."""
        self.num_held += count
        if owner.quota is None:
            owner.held += count
            return
        floor = owner.quota.floor
        self.unmet -= max(0, floor - owner.held)
        owner.held += count
        self.unmet += max(0, floor - owner.held)

    def recharge(self, owner: Owner, change: int) -> None:
        """So many more blocks stand for the owner."""
        owner.charge += change
        if owner.quota is None:
            self.forget_if_empty(owner)
        elif owner.excess:
            self.over[owner] = None

    def leaves_floors(self, wanted: Mapping[Owner, int]) -> bool:
        """Whether all floors could still be held if owners held so many blocks more."""
        unmet = self.unmet
        for owner, count in wanted.items():
            unmet += max(0, owner.floor - owner.held - count) - max(0, owner.floor - owner.held)
        return self.num_held + sum(wanted.values()) + unmet <= self._num_blocks

    def forget_if_empty(self, owner: Owner) -> None:
        """Drop an account that says nothing."""
        if not owner.charge and owner.quota is None:
            self._owners.pop(owner.root, None)
