"""What it takes to begin a sequence: its cached prefix on the device or on its way there, and blocks for the rest.

Knows one sequence at a time and nothing of the queue. Invariant: a sequence that is not admitted holds nothing, but for
one whose load is under way.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvstore.block_pool import BlockPool
from kvstore.block_table import BlockTable
from kvstore.scope import ScopeRoot
from kvstore.tiers import Attached, Tiers
from worker.holdings import Holdings
from worker.sequence import AdmissionFacts, Sequence


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """`max_batch_tokens` is the token budget of a step.

    With a `window`, a token reads that many positions up to its own and the first `sinks`; the others are given back.
    """

    max_batch_tokens: int
    max_sequences: int
    max_waiting: int
    max_model_len: int
    window: int | None = None
    sinks: int = 0

    def num_held(self, num_positions: int, block_size: int) -> int:
        """Of how many positions at most a sequence so long holds KV at one time."""
        if self.window is None:
            return num_positions
        # What is sealed is given back at once, when a window and a step more have been computed.
        return min(num_positions, self.sinks + 2 * (self.window + self.max_batch_tokens + block_size))


class Admission:
    """Attaches sequences to the blocks of one worker."""

    def __init__(
        self, pool: BlockPool, limits: SchedulerLimits, holdings: Holdings, tiers: Tiers | None = None
    ) -> None:
        self._pool = pool
        self._limits = limits
        self._holdings = holdings
        self._tiers = tiers
        self._blocked: tuple[int, int] | None = None  # who did not fit, and the blocks there were then

    def attach(self, sequence: Sequence, now: float, running: list[Sequence]) -> bool:
        """Find the cached prefix and take blocks for the rest, beside what runs. On False nothing is held, unless the
        sequence has to wait for a load into blocks of its own."""
        alone = not running
        if not alone and sequence.load is None and self._blocked == (sequence.id, self._pool.num_available):
            return False
        if sequence.table is None and not self._find_prefix(sequence, running):
            return False
        table = sequence.blocks
        if sequence.load is not None:
            sequence.num_computed_tokens += sequence.load.num_loaded
        while not (self._has_room(sequence, running) and table.reserve(self._first_reach(sequence))):
            if not alone or not (self._drop_part(sequence) or self._holdings.give_way()):
                sequence.release()
                self._blocked = (sequence.id, self._pool.num_available)
                return False
        self.leave_window(sequence)
        if sequence.admission is None:
            sequence.admission = self._facts(sequence, now)
        sequence.load = sequence.wait = None
        sequence.unsettled = True
        self._blocked = None
        return True

    def _find_prefix(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """Hold the cached prefix; False if the sequence has to wait, for another one or for a load."""
        table = BlockTable(self._pool, sequence.request.regions, no_store=sequence.request.no_store)
        limit = len(sequence.token_ids) - 1
        sequence.table = table
        if self._tiers is None:
            found = Attached(table.attach_prefix(sequence.token_ids, limit))
        else:
            found = self._tiers.attach_prefix(
                table, sequence.token_ids, limit, has_room=lambda: self._has_room(sequence, running)
            )
        sequence.wait = table.pending
        if sequence.wait is not None:
            sequence.release()
            return False
        sequence.load = found.load
        sequence.num_computed_tokens = found.num_tokens
        return not sequence.must_wait()

    def _drop_part(self, sequence: Sequence) -> bool:
        """Do without the copied start of a block, if there is one: its source is a block more to hold."""
        if not sequence.num_computed_tokens % self._pool.block_size:
            return False
        sequence.blocks.release()
        limit = len(sequence.token_ids) - 1
        sequence.num_computed_tokens = sequence.blocks.attach_blocks(sequence.token_ids, limit)
        return True

    def _facts(self, sequence: Sequence, now: float) -> AdmissionFacts:
        cached, load, table = sequence.num_computed_tokens, sequence.load, sequence.blocks
        loaded, published = (load.num_loaded, load.num_published) if load is not None else (0, 0)
        first, pulled = cached - loaded, sequence.request.pulled
        remote = _overlap(range(first, cached), pulled)
        remote_published = _overlap(range(first, first + published), pulled)
        return AdmissionFacts(
            cached_device_tokens=cached - loaded,
            cached_cpu_tokens=loaded - remote,
            cached_remote_tokens=remote,
            cached_cpu_published_tokens=published - remote_published,
            cached_remote_published_tokens=remote_published,
            cached_published_tokens=table.cached_published + published,
            queue_s=now - sequence.queued_at,
            blocks_copied=int(cached % self._pool.block_size > 0),
            pulled_tokens=len(pulled),
            pull_s=sequence.request.pull_s,
            peer_lacks=sequence.request.peer_lacks,
        )

    def reach(self, sequence: Sequence, end: int) -> int:
        """Up to where a sequence gets blocks in a step that computes up to `end`.

        All its tokens; but with a window, that gives others back meanwhile, or a CPU tier, that copies what is evicted
        first and is no faster than the steps, only to `end`.
        """
        num_tokens = sequence.num_tokens
        at_once = self._limits.window is None and self._tiers is None
        return num_tokens if at_once else min(num_tokens, end)

    def _first_reach(self, sequence: Sequence) -> int:
        return self.reach(sequence, sequence.num_computed_tokens + self._limits.max_batch_tokens)

    def _has_room(self, sequence: Sequence, running: list[Sequence]) -> bool:
        """Whether there will be blocks for all its tokens and for those of all that run, where they do not get them at
        once: by what floors leave, as others who hold blocks meanwhile keep them."""
        if self._tiers is None or self._limits.window is not None:
            return True
        wanted = Counter[ScopeRoot]()
        for one in (sequence, *running):
            wanted[one.request.owner] += self._missing(one)
        return self._pool.has_room(wanted, alone=sequence.blocks.is_alone)

    def _missing(self, sequence: Sequence) -> int:
        return -(-sequence.num_tokens // self._pool.block_size) - len(sequence.blocks.block_ids)

    def leave_window(self, sequence: Sequence) -> None:
        """Give back blocks that no token to come will read."""
        if self._limits.window is not None:
            first = sequence.num_computed_tokens - self._limits.window + 1
            sequence.blocks.release_before(max(first, 0), sinks=self._limits.sinks)

    @property
    def is_strict(self) -> bool:
        """Whether nobody may go before one that does not fit: there are no loads and no floors."""
        return self._tiers is None and not self._holdings.has_floors

    def is_over_floor(self, sequence: Sequence) -> bool:
        """Whether its owner holds what is not its own."""
        owner = self._pool.account(sequence.request.owner)
        return owner.held > owner.floor

    def is_within_floor(self, sequence: Sequence) -> bool:
        """Whether its owner would still hold what is its own alone, with blocks for all its tokens."""
        if not self._holdings.has_floors:
            return False
        owner = self._pool.account(sequence.request.owner)
        return owner.held - (-len(sequence.token_ids) // self._pool.block_size) <= owner.floor


def _overlap(one: range, other: range) -> int:
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
