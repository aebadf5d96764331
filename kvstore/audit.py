"""The pool's check of itself.

Reads a pool's inner state and changes nothing. The counts are cheap enough for an idle worker, the blocks are not.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvstore.block import BrokenInvariant
from kvstore.events import DEVICE
from kvstore.scope import ScopeRoot

if TYPE_CHECKING:
    from kvstore.block_pool import BlockPool


def check_counts(pool: BlockPool) -> None:
    """Raise BrokenInvariant unless blocks and charges add up."""
    if pool.num_blocks - pool._references.count(0) != pool.num_referenced:
        raise BrokenInvariant("the count of referenced blocks is wrong")
    if not 0 <= pool.num_cached <= min(pool.num_available, pool.num_sealed):
        raise BrokenInvariant("the count of cached blocks is wrong")
    if len(pool._free) != pool.num_free:
        raise BrokenInvariant("the free queue has lost or doubled a block")
    if sum(owner.charge for owner in pool._ledger.owners()) != pool.num_blocks - pool.num_free:
        raise BrokenInvariant("the charges do not sum to the blocks in use")


def check_blocks(pool: BlockPool) -> None:
    """Raise BrokenInvariant unless every block is in exactly one place and every content where it belongs."""
    keys, references = pool.contents.keys, pool._references
    free = set(pool._free)
    if len(free) != len(pool._free):
        raise BrokenInvariant("the free queue has lost or doubled a block")
    if any(references[block] or keys[block] or pool._owners[block] for block in free):
        raise BrokenInvariant("a block that is not free stands in the free queue")
    pool.contents.check(closed=pool.tier == DEVICE)
    cached = {block for block in range(pool.num_blocks) if not references[block] and keys[block] is not None}
    if len(cached) != pool.num_cached:
        raise BrokenInvariant("the count of cached blocks is wrong")
    pool._order.check(cached)
    _check_charges(pool)


def num_sealed_of(pool: BlockPool, root: ScopeRoot) -> int:
    """How many blocks of the owner of `root` can be found: a scan, the proof of a purge."""
    owner = pool.account(root)
    return sum(pool._owners[block] is owner for block in pool.contents.by_key.values())


def charges(pool: BlockPool) -> dict[ScopeRoot | None, int]:
    """Blocks by owner; their sum is what is not free."""
    return {owner.root: owner.charge for owner in pool._ledger.owners() if owner.charge}


def _check_charges(pool: BlockPool) -> None:
    owners = pool._ledger.owners()
    charged = Counter(owner for owner in pool._owners if owner is not None)
    held = Counter(owner for owner, count in zip(pool._owners, pool._references, strict=True) if owner and count)
    if pool._ledger.num_held != sum(held.values()):
        raise BrokenInvariant("the count of held blocks is wrong")
    if any(charged[owner] != owner.charge or held[owner] != owner.held for owner in owners):
        raise BrokenInvariant("the charge of an owner is wrong")
    if pool._ledger.unmet != sum(max(0, owner.floor - owner.held) for owner in owners):
        raise BrokenInvariant("the unmet floors are wrong")
