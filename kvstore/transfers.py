"""Orders for copies between tiers, as frozen values: what a runner carries out and answers.

Knows block ids and numbers only. Invariant: an order is answered at most once; a second answer, or one to an order that
has lost its sense, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.block import BlockId


@dataclass(frozen=True, slots=True)
class Demote:
    """Copy device block `source` to CPU block `target` and answer with a checksum of what was copied."""

    id: int
    source: BlockId
    target: BlockId


@dataclass(frozen=True, slots=True)
class Promote:
    """Copy CPU block `source` to device block `target`, and say whether what was copied has this checksum."""

    id: int
    source: BlockId
    target: BlockId
    checksum: int


@dataclass(frozen=True, slots=True)
class Orders:
    """Carry these out on one stream, wipes first: a wiped block may be the target of a demotion behind it.

    `wipes` are CPU blocks to overwrite with zeros.
    """

    wipes: tuple[BlockId, ...] = ()
    demotions: tuple[Demote, ...] = ()
    promotions: tuple[Promote, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.wipes or self.demotions or self.promotions)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds, as measured on this worker; 0 is not measured yet.

    `load_s` for a load however small, `load_block_s` for each block of it, `prefill_token_s` for each computed token.
    """

    load_s: float = 0.0
    load_block_s: float = 0.0
    prefill_token_s: float = 0.0

    def prefers_load(self, num_blocks: int, block_size: int) -> bool:
        """Whether loading is cheaper than computing; without measurement it is tried, which measures it."""
        computing = num_blocks * block_size * self.prefill_token_s
        return not computing or self.load_s + num_blocks * self.load_block_s < computing
