"""The copies that one sequence's blocks wait for.

Knows ids only. Invariant: a source is held from the order until its copy is done or given up.
"""

from __future__ import annotations

from kvstore.block import BlockId, CopyOrder
from kvstore.block_pool import BlockPool


class Copies:
    """Orders on their way, in order. `order` is told of sources that are held already, and takes that over."""

    __slots__ = ("_orders", "_pool", "sources")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._orders: list[CopyOrder] = []  # not yet taken
        self.sources: list[BlockId] = []
        """Held until their copies are done."""

    def order(self, source: BlockId, target: BlockId, num_tokens: int) -> None:
        """Copy the first positions of a block before the next step writes."""
        self.sources.append(source)
        self._orders.append(CopyOrder(source, target, num_tokens))

    def take(self) -> list[CopyOrder]:
        """Copies to carry out before the next step writes."""
        orders, self._orders = self._orders, []
        return orders

    def done(self) -> None:
        """The copies taken so far were carried out."""
        if self.sources:
            kept = [order.source for order in self._orders]
            done = self.sources[: len(self.sources) - len(kept)]
            self.sources = kept
            self._pool.release(done)
