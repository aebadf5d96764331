"""The prefix index in memory: one dictionary entry for each block key, its workers as bits of an integer.

Knows no network and no clock. Invariant: what a worker holds is closed under parents, so whether it holds the first n
blocks can be read off block n alone, and the longest prefix is a binary search.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import repeat

from kvstore.block import BlockKey, WorkerId
from kvstore.events import (
    CPU,
    DEVICE,
    BlocksRemoved,
    BlocksStored,
    Cleared,
    Event,
    TierChanged,
    keys_sum,
    state_digest,
)
from kvstore.index import CachedPrefix

_SWEEP = 2048
_SEARCHES = 4


class MemoryIndex:
    """Implements `PrefixIndex`. A worker is dropped in O(1): its bit no longer counts and is swept up later."""

    def __init__(self) -> None:
        self._tiers: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self._slots: dict[WorkerId, _Slot] = {}
        self._names: list[WorkerId | None] = []
        # Bits of slots: given out; of these, current ones that count; dropped ones that entries may still have.
        self._taken = 0
        self._live = 0
        self._dead = 0
        self._sweep: Iterator[None] | None = None
        self._workers_of: dict[int, tuple[WorkerId, ...]] = {}
        self._prefixes: dict[tuple[int, int], CachedPrefix] = {}

    def __len__(self) -> int:
        """Distinct blocks, those of dropped workers included until they are swept."""
        device, cpu = self._tiers
        return len(device) + sum(key not in device for key in cpu) if cpu else len(device)

    def apply(self, worker: WorkerId, epoch: int, events: Iterable[Event]) -> None:
        """Take in what changed at a worker. A newer epoch voids all of the older one; an older epoch is ignored."""
        slot = self._slots.get(worker)
        if slot is None or epoch > slot.epoch:
            slot = self._claim(worker, epoch)
        elif epoch < slot.epoch:
            return
        for event in events:
            if isinstance(event, Cleared):
                slot = self._claim(worker, epoch)
            elif isinstance(event, BlocksStored):
                self._store(slot, event.tier, event.keys)
            elif isinstance(event, BlocksRemoved):
                self._remove(slot, event.tier, event.keys)
            elif isinstance(event, TierChanged):
                self._store(slot, event.tier, event.keys)
                self._remove(slot, DEVICE if event.tier == CPU else CPU, event.keys)
        if self._dead:
            self.sweep()

    def load(self, worker: WorkerId, epoch: int) -> Loading:
        """Begin to read a worker's state anew; what is known of it counts until the new state is committed."""
        return Loading(self, worker, self._claim_slot(epoch))

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, CachedPrefix]:
        """The longest resident prefix of `keys` for each worker that holds at least the first block."""
        device, cpu = self._tiers
        if not keys:
            return {}
        if cpu:
            return self._match_tiers(keys)
        found: dict[WorkerId, CachedPrefix] = {}
        for depth, mask in _depths(keys, device.get, self._live):
            workers, prefix = self._workers(mask), self._prefix(depth, 0)
            if found:
                for worker in workers:
                    found[worker] = prefix
            else:
                found = dict.fromkeys(workers, prefix)
        return found

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker; its entries are gone at once."""
        self._drop(worker)

    def num_blocks(self, worker: WorkerId) -> int:
        """Blocks the worker holds, each tier counted."""
        slot = self._slots.get(worker)
        return 0 if slot is None else sum(slot.counts)

    def digest(self, worker: WorkerId) -> int:
        """`state_digest` of all that the worker holds; kept up with every change, so that asking is O(1)."""
        slot = self._slots.get(worker)
        return 0 if slot is None else state_digest(*slot.sums)

    def workers(self) -> list[WorkerId]:
        """All workers that have entries or had an event."""
        return list(self._slots)

    def keys_of(self, worker: WorkerId, tier: int = DEVICE) -> set[bytes]:
        """All keys a worker holds in a tier: a scan, for checks and repair."""
        slot = self._slots.get(worker)
        return set() if slot is None else {key for key, mask in self._tiers[tier].items() if mask & slot.bit}

    def sweep(self) -> bool:
        """Clear a bounded number of entries of dropped workers; True when more are left."""
        if self._sweep is None and self._dead:
            self._sweep = self._sweeping()
        if self._sweep is not None and next(self._sweep, self) is self:
            self._sweep = None
        return bool(self._dead)

    def _claim(self, worker: WorkerId, epoch: int) -> _Slot:
        slot = self._claim_slot(epoch)
        self._activate(worker, slot)
        return slot

    def _claim_slot(self, epoch: int) -> _Slot:
        """A slot with the lowest bit that nobody has; it counts once it is activated."""
        bit = ~self._taken & (self._taken + 1)
        self._taken |= bit
        if bit.bit_length() > len(self._names):
            self._names.append(None)
        return _Slot(bit, epoch)

    def _activate(self, worker: WorkerId, slot: _Slot) -> None:
        self._drop(worker)
        self._slots[worker] = slot
        self._names[slot.bit.bit_length() - 1] = worker
        self._live |= slot.bit
        self._workers_of.clear()

    def _retire(self, slot: _Slot) -> None:
        """The slot's bit no longer counts; it is free again once no entry has it."""
        self._live &= ~slot.bit
        if slot.touched:
            self._dead |= slot.bit
        else:
            self._taken &= ~slot.bit

    def _drop(self, worker: WorkerId) -> None:
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        self._retire(slot)
        self._names[slot.bit.bit_length() - 1] = None
        self._workers_of.clear()

    def _store(self, slot: _Slot, tier: int, keys: Iterable[bytes]) -> None:
        entries = self._tiers[tier]
        bit = slot.bit
        stored = dict.fromkeys(keys, bit)
        fresh: Collection[bytes] = stored
        if entries.keys().isdisjoint(stored):
            entries.update(stored)
        else:
            fresh = [key for key in stored if not entries.get(key, 0) & bit]
            for key in fresh:
                entries[key] = entries.get(key, 0) | bit
        slot.counts[tier] += len(fresh)
        slot.sums[tier] += keys_sum(fresh)
        slot.touched = True

    def _store_new(self, slot: _Slot, tier: int, keys: Sequence[bytes]) -> None:
        """As `_store`, of keys that the slot does not have: each is looked up once."""
        entries = self._tiers[tier]
        bit = slot.bit
        masks = list(map(entries.setdefault, keys, repeat(bit)))
        if masks.count(bit) < len(keys):
            for key, mask in zip(keys, masks, strict=True):
                if mask != bit:
                    entries[key] = mask | bit
        slot.counts[tier] += len(keys)
        slot.sums[tier] += keys_sum(keys)
        slot.touched = True

    def _remove(self, slot: _Slot, tier: int, keys: Iterable[bytes]) -> None:
        entries = self._tiers[tier]
        bit = slot.bit
        gone: list[bytes] = []
        for key in keys:
            mask = entries.get(key, 0)
            if mask & bit:
                gone.append(key)
                if mask == bit:
                    del entries[key]
                else:
                    entries[key] = mask ^ bit
        slot.counts[tier] -= len(gone)
        slot.sums[tier] -= keys_sum(gone)

    def _sweeping(self) -> Iterator[None]:
        """Clears the bits of workers dropped before it began, a slice of the entries at each turn."""
        dead = self._dead
        for entries in self._tiers:
            keys = list(entries)
            for first in range(0, len(keys), _SWEEP):
                for key in keys[first : first + _SWEEP]:
                    mask = entries.get(key, 0)
                    if mask & dead:
                        mask &= ~dead
                        if mask:
                            entries[key] = mask
                        else:
                            del entries[key]
                yield
        self._dead &= ~dead
        self._taken &= ~dead

    def _workers(self, mask: int) -> tuple[WorkerId, ...]:
        """Names of the bits in `mask`; remembered, as few different masks occur."""
        names = self._workers_of.get(mask)
        if names is None:
            if len(self._workers_of) >= _SWEEP:
                self._workers_of.clear()
            names = tuple(name for at, name in enumerate(self._names) if mask >> at & 1 and name is not None)
            self._workers_of[mask] = names
        return names

    def _prefix(self, device_blocks: int, cpu_blocks: int) -> CachedPrefix:
        """Remembered, as making a frozen value takes longer than finding it."""
        at = device_blocks, cpu_blocks
        prefix = self._prefixes.get(at)
        if prefix is None:
            if len(self._prefixes) >= _SWEEP:
                self._prefixes.clear()
            prefix = self._prefixes[at] = CachedPrefix(device_blocks, cpu_blocks)
        return prefix

    def _match_tiers(self, keys: Sequence[BlockKey]) -> dict[WorkerId, CachedPrefix]:
        """Device prefix, then what either tier adds to it."""
        device, cpu = self._tiers
        on_device: dict[WorkerId, int] = {}
        for depth, mask in _depths(keys, device.get, self._live):
            on_device.update(dict.fromkeys(self._workers(mask), depth))
        found: dict[WorkerId, CachedPrefix] = {}
        for depth, mask in _depths(keys, lambda key: device.get(key, 0) | cpu.get(key, 0), self._live):
            for worker in self._workers(mask):
                first = on_device.get(worker, 0)
                found[worker] = self._prefix(first, depth - first)
        return found


class Loading:
    """A worker's state while it is read: `store` its parts, then `commit` to put it in place, or `abandon`."""

    __slots__ = ("_index", "_slot", "_worker")

    def __init__(self, index: MemoryIndex, worker: WorkerId, slot: _Slot) -> None:
        self._index = index
        self._worker = worker
        self._slot = slot

    def store(self, tier: int, keys: list[bytes]) -> None:
        """These blocks, none named before, are resident in `tier`."""
        self._index._store_new(self._slot, tier, keys)

    def commit(self) -> None:
        """What was stored is now all that the worker holds."""
        self._index._activate(self._worker, self._slot)

    def abandon(self) -> None:
        """Nothing changes."""
        self._index._retire(self._slot)


class _Slot:
    """One life of a worker in the index: its bit, and how many blocks it holds in each tier."""

    __slots__ = ("bit", "counts", "epoch", "sums", "touched")

    def __init__(self, bit: int, epoch: int) -> None:
        self.bit = bit
        self.epoch = epoch
        self.counts = [0, 0]
        self.sums = [0, 0]
        self.touched = False


def _depths(keys: Sequence[BlockKey], holders: Callable[[bytes], int | None], live: int) -> list[tuple[int, int]]:
    """(depth, workers whose longest prefix is that deep), for each depth that occurs.

    The set of workers that hold block n shrinks as n grows, so where the next of them ends is a binary search. Where
    many end at different depths, looking at every block is faster.
    """
    held = (holders(keys[0]) or 0) & live
    if not held:
        return []
    last = len(keys) - 1
    to_the_end = (holders(keys[last]) or 0) & held
    found = [(last + 1, to_the_end)] if to_the_end else []
    at = 0
    searches = 0

    def has_fewer(key: bytes) -> bool:
        return (holders(key) or 0) & held != held

    while held != to_the_end and searches < _SEARCHES:
        searches += 1
        at = bisect_left(keys, True, at + 1, last, key=has_fewer)
        still = (holders(keys[at]) or 0) & held | to_the_end
        found.append((at, held ^ still))
        held = still
    if held == to_the_end:
        return found
    masks = list(map(holders, keys[at + 1 :]))
    where = 0
    for mask in dict.fromkeys(masks):
        still = (mask or 0) & held | to_the_end
        if still != held:
            where = masks.index(mask, where)
            found.append((at + 1 + where, held ^ still))
            held = still
    return found
