"""A step in the making: what each sequence gets of the token budget, and the block copies that come first.

Knows one step only. Invariant: the shares never exceed the budget, a sequence has at most one, and until `batch` nobody
is changed by it.
"""

from __future__ import annotations

from array import array

from worker.batch import Batch, BlockCopy, ScheduledSequence
from worker.sequence import Sequence

_UNREAD = array("I", [0])


class StepPlan:
    """`budget` is what is left of the step's tokens."""

    __slots__ = ("_sequences", "_shares", "budget")

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._sequences: list[Sequence] = []
        self._shares: list[ScheduledSequence] = []

    @property
    def is_empty(self) -> bool:
        """Whether nobody has a share yet."""
        return not self._shares

    def end_of(self, sequence: Sequence) -> int:
        """Where the sequence's share of what is left of the budget ends."""
        start = sequence.next_position
        end = min(start + self.budget, sequence.num_tokens)
        return sequence.blocks.share_end(sequence.token_ids, start, end)

    def add(self, sequence: Sequence) -> None:
        """Give the sequence its share."""
        start, end = sequence.next_position, self.end_of(sequence)
        known, last = sequence.token_ids[start:end], end == sequence.num_tokens
        self.budget -= end - start
        self._sequences.append(sequence)
        self._shares.append(
            ScheduledSequence(
                sequence_id=sequence.id,
                token_ids=known or _UNREAD,
                start=start,
                block_ids=sequence.blocks.block_ids,
                sampling=sequence.request.sampling if last else None,
                banned_token_ids=sequence.banned_token_ids if last else (),
                fork_sampling=tuple(fork.request.sampling for fork in sequence.forks) if last else (),
                fork_ids=tuple(fork.id for fork in sequence.forks) if last else (),
                follows=None if known else sequence.newest_draw,
            )
        )

    def batch(self) -> Batch | None:
        """The batch, if there is anything in it: its sequences are on their way from now on."""
        copies: list[BlockCopy] = []
        num_draws = 0
        for sequence, share in zip(self._sequences, self._shares, strict=True):
            if sequence.unsettled:
                copies += [BlockCopy(*order) for order in sequence.blocks.take_copies()]
            sequence.launched(len(share.token_ids), num_draws if share.draws else None)
            num_draws += len(share.draws)
        return Batch(tuple(self._shares), tuple(copies)) if self._shares else None
