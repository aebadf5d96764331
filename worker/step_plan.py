"""A step in the making: what each sequence gets of the token budget, and the block copies that come first.

Knows one step only. Invariant: the shares never exceed the budget, and a sequence has at most one.
"""

from __future__ import annotations

from worker.batch import Batch, BlockCopy, ScheduledSequence
from worker.sequence import Sequence


class StepPlan:
    """`budget` is what is left of the step's tokens."""

    __slots__ = ("_copies", "_shares", "budget")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._shares: list[ScheduledSequence] = []
        self._copies: list[BlockCopy] = []

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a share yet."""
        return not self._shares

    def end_of(self, sequence: Sequence) -> int:
        """Where the sequence's share of what is left of the budget ends."""
        start = sequence.num_computed_tokens
        end = min(start + self.budget, len(sequence.token_ids))
        return sequence.blocks.share_end(sequence.token_ids, start, end)

    def add(self, sequence: Sequence) -> None:
        """Give the sequence its share."""
        start, end = sequence.num_computed_tokens, self.end_of(sequence)
        table, last = sequence.blocks, end == len(sequence.token_ids)
        self.budget -= end - start
        if sequence.unsettled:
            self._copies += [BlockCopy(*order) for order in table.take_copies()]
        self._shares.append(
            ScheduledSequence(
                sequence_id=sequence.id,
                token_ids=sequence.token_ids[start:end],
                start=start,
                block_ids=table.block_ids,
                sampling=sequence.request.sampling if last else None,
                banned_token_ids=sequence.banned_token_ids if last else (),
                fork_sampling=tuple(fork.request.sampling for fork in sequence.forks) if last else (),
            )
        )

    def batch(self) -> Batch | None:
        """The batch, if there is anything in it."""
        return Batch(tuple(self._shares), tuple(self._copies)) if self._shares else None
