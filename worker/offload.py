"""Between the block store's two tiers and the mover of blocks: orders handed on, answers brought back, speeds taken.

Knows no memory and no sequence. For the engine's thread; nothing here waits. Invariant: each order gets one answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.block_pool import BlockPool
from kvstore.exchange import Exchange, Import
from kvstore.tiers import LOOK_AHEAD, TierCounts, Tiers, cpu_pool
from kvstore.transfers import Rates
from worker.batch import Direction, Transfer
from worker.runner import BlockMover

MAX_DEMOTIONS = 64
"""Under way at once."""
MOVING_INTERVAL_S = 0.0005
"""How often an engine that has nothing to compute looks for blocks that have come."""
RATE_WEIGHT = 0.1
"""Of the newest promotion in the measured time of one."""


class Offload:
    """A CPU tier behind `pool`, in the memory of `mover`. `answer` before a step is scheduled, `order` after."""

    def __init__(self, pool: BlockPool, mover: BlockMover) -> None:
        # What is looked at to be copied must fit the tier, or copies would drive each other out for ever.
        most = max(1, min(MAX_DEMOTIONS, mover.num_blocks // (2 * LOOK_AHEAD)))
        self.tiers = Tiers(pool, cpu_pool(pool, mover.num_blocks), max_demotions=most)
        self.exchange = Exchange(self.tiers)
        self._mover = mover
        self._directions: dict[int, Direction] = {}
        self._promote_s = 0.0
        self._room = 0

    @property
    def counts(self) -> TierCounts:
        """What was moved since the start."""
        return self.tiers.counts

    @property
    def num_moving(self) -> int:
        """Blocks on their way."""
        return len(self._directions)

    @property
    def mover(self) -> BlockMover:
        """Who has the CPU tier's memory."""
        return self._mover

    def begin_import(self, arriving: Import) -> None:
        """Make room for blocks from elsewhere. What is to be wiped is said first: later it would erase what comes."""
        self.exchange.begin_import(arriving)
        self._wipe(self.tiers.cpu.take_wipes())

    def answer(self, *, step_s: float, num_sequences: int, prefill_tokens_per_s: float) -> None:
        """Tell the store which copies have ended, and what loading and computing take at present.

        Both are counted as the delay of all `num_sequences`, divided by their number: computing keeps everybody
        waiting, and so do copies, those who have loads to come; but until the end of the step that goes by meanwhile,
        a load keeps its own sequence alone from its start. Where there is no other, no step goes by.
        """
        for end in self._mover.take_ended():
            if self._directions.pop(end.number) is Direction.DEMOTE:
                # Whoever moves the blocks keeps and compares checksums of its own.
                self.tiers.demoted(end.number, 0, ok=end.ok)
            else:
                if end.ok:
                    self._promote_s += (end.seconds - self._promote_s) * (RATE_WEIGHT if self._promote_s else 1.0)
                self.tiers.promoted(end.number, ok=end.ok)
        until_seen_s = step_s / num_sequences if num_sequences > 1 else MOVING_INTERVAL_S
        self.tiers.rates = Rates(
            load_s=until_seen_s + self.num_moving * self._promote_s,
            load_block_s=self._promote_s,
            prefill_token_s=1.0 / prefill_tokens_per_s if prefill_tokens_per_s else 0.0,
        )

    def order(self, *, idle: bool) -> None:
        """Have the blocks copied that sequences wait for, and those that are evicted next; `idle`: nothing is computed.

        Between two steps that compute, no more is copied than the device has, so that an idle worker comes to rest.
        """
        if not idle:
            self._room = self.tiers.device.num_blocks
        if self._room > 0:
            self._room -= self.tiers.demote()
        orders = self.tiers.take_orders()
        self._wipe(orders.wipes)
        transfers = [Transfer(one.id, Direction.DEMOTE, one.source, one.target) for one in orders.demotions]
        transfers += [Transfer(one.id, Direction.PROMOTE, one.source, one.target) for one in orders.promotions]
        if transfers:
            self._directions.update((transfer.number, transfer.direction) for transfer in transfers)
            self._mover.start(transfers)

    def _wipe(self, blocks: Sequence[int]) -> None:
        if blocks:
            self._mover.wipe(blocks)
