"""What owners may keep on this worker, on all its tiers: their quotas, who pays for a shared scope, pins, purges.

Knows owners by the roots of scopes and nothing of sequences. For the engine's thread. Invariant: a request is never
refused here: a quota that cannot be granted is granted without its floor.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kvstore.block_pool import BlockPool
from kvstore.pins import Pins
from kvstore.quota import Quota
from kvstore.scope import Region, ScopeRoot
from kvstore.tiers import Tiers

logger = logging.getLogger(__name__)

Publishers = tuple[tuple[ScopeRoot, ScopeRoot], ...]
"""Scopes that somebody publishes in, and the owner who is charged for their blocks."""


@dataclass(frozen=True, slots=True)
class OwnerQuota:
    """One owner's quota on each tier; pins are on the device."""

    device: Quota = field(default_factory=Quota)
    cpu: Quota = field(default_factory=Quota)

    def lifted(self) -> OwnerQuota:
        """No floors, no ceilings; what is pinned may stay."""
        return OwnerQuota(Quota(pinned=self.device.pinned))


@dataclass(frozen=True, slots=True)
class PinRequest:
    """Keep what is cached of `token_ids`, a published end too, for `ttl_s`. The same name again replaces the pin."""

    name: str
    regions: tuple[Region, ...]
    publishers: Publishers
    token_ids: array[int]
    ttl_s: float
    quota: OwnerQuota | None

    @property
    def owner(self) -> ScopeRoot:
        """Who pays for it."""
        return dict(self.publishers).get(self.regions[0].root, self.regions[0].root)


@dataclass(frozen=True, slots=True)
class PurgeCount:
    """Blocks forgotten on each tier, and how many of them are in use still, found by nobody."""

    device_blocks: int = 0
    cpu_blocks: int = 0
    remaining: int = 0


class Holdings:
    """Accounts of the device pool and, where there are `tiers`, of the CPU pool."""

    def __init__(self, pool: BlockPool, tiers: Tiers | None = None) -> None:
        self._pools = [pool] if tiers is None else [pool, tiers.cpu]
        self._tiers = tiers
        self._pins = Pins(pool)
        self._quotas: dict[ScopeRoot, OwnerQuota] = {}
        self.has_floors = False
        """Whether any owner has device blocks that are always its own."""

    @property
    def num_pins(self) -> int:
        return len(self._pins)

    def admit(self, owner: ScopeRoot, publishers: Publishers, quota: OwnerQuota | None) -> None:
        """Before blocks are taken for `owner`: who pays for what, and what the owner may have; no quota, no bounds."""
        for scope, publisher in publishers:
            for pool in self._pools:
                pool.set_publisher(scope, publisher)
        known = self._quotas.get(owner)
        if quota is None and known is not None:
            quota = known.lifted()
        if quota is not None and quota != known:
            self._quotas[owner] = quota
            self._grant(owner, quota)
            self._look_for_floors()

    def _look_for_floors(self) -> None:
        self.has_floors = any(one.device.floor for one in self._quotas.values())

    def _grant(self, owner: ScopeRoot, quota: OwnerQuota) -> None:
        try:
            self._pins.set_quota(owner, quota.device)
        except ValueError:
            logger.warning("the floors of all owners are more than the device has; one is left without")
            self._pins.set_quota(owner, replace(quota.device, floor=0))
        if self._tiers is None:
            return
        try:
            self._tiers.cpu.set_quota(owner, quota.cpu)
        except ValueError:
            logger.warning("the floors of all owners are more than the CPU tier has; one is left without")
            self._tiers.cpu.set_quota(owner, replace(quota.cpu, floor=0))

    def pin(self, pin: PinRequest, now: float) -> int:
        """Pin what is resident and within the owner's budget; how many tokens."""
        self.admit(pin.owner, pin.publishers, pin.quota)
        return self._pins.pin(pin.name, pin.regions, pin.token_ids, now + pin.ttl_s)

    def unpin(self, name: str) -> None:
        """Give a pin's blocks back to the cache; nothing if there is none of that name."""
        self._pins.unpin(name)

    def expire(self, now: float) -> None:
        """Drop the pins whose time is over."""
        if len(self._pins):
            self._pins.expire(now)

    def give_way(self) -> bool:
        """Drop one pin, for a request that has no other way to run; False without pins."""
        return self._pins.give_way()

    def purge(self, roots: Iterable[ScopeRoot]) -> PurgeCount:
        """Forget all blocks, pins and quotas of these owners."""
        before = [pool.num_sealed for pool in self._pools]
        held = 0
        for root in roots:
            self._pins.drop_owner(root)
            if self._quotas.pop(root, None) is not None:
                for pool in self._pools:
                    pool.set_quota(root, None)
            held += (self._tiers or self._pools[0]).purge(root).held
        self._look_for_floors()
        forgotten = [count - pool.num_sealed for count, pool in zip(before, self._pools, strict=True)]
        return PurgeCount(forgotten[0], sum(forgotten[1:]), held)
