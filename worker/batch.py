"""The scheduler's decision for one step, as frozen values: what every runner executes.

Knows sequences by number only: nothing of tenants, requests or the queue.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy at least the first `num_tokens` positions of block `source` to block `target` before the step.

    Nobody reads what was behind them: a runner may as well copy the whole block.
    """

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One sequence's share of a step: compute `token_ids` at positions [start, start + len(token_ids)).

    `block_ids` is the sequence's block table; block i holds positions [i * block_size, (i + 1) * block_size) and the
    table covers every position up to the last one computed. All positions before `start` are already in the cache,
    but for blocks that left a sliding window: their id is -1, and no query of the step may see them.
    `sampling` is None while the chunk ends before the sequence's last token; else one token is sampled after it, at
    absolute position `start + len(token_ids)`, and none of `banned_token_ids` is drawn. `fork_sampling` draws further
    tokens at that same position: the first ones of the sequences `fork_ids`, which have the prompt in common and go
    apart here.
    With `follows` the one token of `token_ids` stands for another: for what the step launched before draws as that
    number of its answer.
    """

    sequence_id: int
    token_ids: array[int]  # 'I', at least one
    start: int
    block_ids: Sequence[int]
    sampling: SamplingParams | None = None
    banned_token_ids: tuple[int, ...] = ()
    fork_sampling: tuple[SamplingParams, ...] = ()
    fork_ids: tuple[int, ...] = ()
    follows: int | None = None

    @property
    def end(self) -> int:
        """The first position behind what is computed."""
        return self.start + len(self.token_ids)

    @property
    def draws(self) -> tuple[SamplingParams, ...]:
        """How each token is drawn that this share asks for, in the order of the runner's answer."""
        return () if self.sampling is None else (self.sampling, *self.fork_sampling)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: block copies first, in order, then all sequences together."""

    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens this step computes."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)


class Direction(Enum):
    """DEMOTE: device to CPU; PROMOTE: CPU to device."""

    DEMOTE = auto()
    PROMOTE = auto()


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy all of block `source` of one tier to block `target` of the other, beside the steps.

    `number` names the transfer and is never used again. The source of a DEMOTE may be overwritten by a later step while
    it is read: then its end comes too late for anybody. Nothing else writes to either block before the end is told.
    """

    number: int
    direction: Direction
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class TransferEnd:
    """A transfer that ended. Not `ok`: nothing was copied, or the payload is not the one that was demoted.

    `seconds` is what this block took of the link between the tiers, for the choice to load or to compute.
    """

    number: int
    ok: bool
    seconds: float
