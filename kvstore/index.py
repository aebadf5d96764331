"""The prefix index as its readers and writers see it.

Knows no network. Invariant: what an index says is advice: a wrong answer costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.block import BlockKey, WorkerId
from kvstore.events import Event


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """How many leading blocks of a prompt a worker holds: on its device, and then further ones on its CPU tier."""

    device_blocks: int
    cpu_blocks: int = 0

    @property
    def num_blocks(self) -> int:
        """Length of the prefix over both tiers."""
        return self.device_blocks + self.cpu_blocks


class PrefixIndex(Protocol):
    """Block keys to the workers and tiers that hold them."""

    def apply(self, worker: WorkerId, epoch: int, events: Iterable[Event]) -> None:
        """Take in what changed at a worker. A newer epoch voids all of the older one; an older epoch is ignored."""
        ...

    def match(self, keys: Sequence[BlockKey]) -> dict[WorkerId, CachedPrefix]:
        """The longest resident prefix of `keys` for each worker that holds at least the first block."""
        ...

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget a worker; its entries are gone at once."""
        ...

    def num_blocks(self, worker: WorkerId) -> int:
        """Blocks the worker holds, each tier counted."""
        ...
