"""A batch as arrays: what a step needs to know before it runs.

Knows numbers only. Nothing of the batch is read after they are made.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from kernels import StepNumbers
from worker.batch import Batch, BlockCopy, ScheduledSequence
from worker.runner import ModelSpec
from worker.sampler import Draw

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tokens of all sequences packed in order; copies come first."""

    step: StepNumbers
    copies: tuple[BlockCopy, ...]
    draws: list[Draw]
    drawn_from: list[int] | None
    """[num_draws]: after which of `step.wanted` each is; None: after each of them one."""
    followed: list[tuple[int, int]]
    """Which of the packed tokens the step before draws, and as which draw."""

    @property
    def query_ends(self) -> Ints:
        """[num_seqs], of num_tokens."""
        return np.cumsum(self.step.query_lens)

    @property
    def positions(self) -> Ints:
        """[num_tokens]."""
        step, ends = self.step, self.query_ends
        return np.arange(step.num_tokens) + np.repeat(step.context_lens - ends, step.query_lens)


def step_inputs(batch: Batch, spec: ModelSpec) -> StepInputs:
    """All numbers of a step. Plain lists on purpose: between two steps of a large model no library is in the cache, and
    a function of NumPy takes as long as dozens of lines here."""
    sequences = batch.sequences
    draws, wanted, drawn_from = _draws(batch)
    lens = [len(sequence.token_ids) for sequence in sequences]
    contexts = [sequence.start + count for sequence, count in zip(sequences, lens, strict=True)]
    numbers = array("q", [*lens, *contexts, *wanted])
    for sequence in sequences:
        numbers.fromlist(sequence.token_ids.tolist())
    widths = [-(-context // spec.block_size) for context in contexts]
    most = max(widths)
    for sequence, width in zip(sequences, widths, strict=True):
        numbers.fromlist(_table(sequence, width, spec))
        numbers.fromlist([-1] * (most - width))
    step = StepNumbers(numbers, len(lens), len(wanted), sum(lens), most)
    if not step.is_whole:
        raise ValueError("a block table does not cover its context")
    return StepInputs(step, batch.copies, draws, drawn_from, _followed(batch))


def written_blocks(batch: Batch, block_size: int) -> Iterator[int]:
    """The blocks that the step writes."""
    yield from (copy.target for copy in batch.copies)
    for sequence in batch.sequences:
        last = sequence.end - 1
        yield from sequence.block_ids[sequence.start // block_size : last // block_size + 1]


def independent_copies(copies: Sequence[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Copies in order, in runs of which none reads what one before it writes, or writes what one before it writes."""
    run: list[BlockCopy] = []
    targets: set[int] = set()
    for copy in copies:
        if copy.source in targets or copy.target in targets:
            yield run
            run, targets = [], set()
        run.append(copy)
        targets.add(copy.target)
    if run:
        yield run


def _table(sequence: ScheduledSequence, width: int, spec: ModelSpec) -> list[int]:
    """The first `width` blocks, -1 for those that no query reads."""
    sinks, first = _read_blocks(sequence.start, spec)
    blocks = sequence.block_ids
    if first <= sinks:
        return list(blocks[:width])
    return [*blocks[:sinks], *[-1] * (first - sinks), *blocks[first:width]]


def _read_blocks(start: int, spec: ModelSpec) -> tuple[int, int]:
    """A step from position `start` on reads so many first blocks, and those from the second number on."""
    first = 0 if spec.window is None else max(0, start - spec.window + 1) // spec.block_size
    return -(-spec.sinks // spec.block_size), first


def _draws(batch: Batch) -> tuple[list[Draw], list[int], list[int] | None]:
    """What to sample, after which of the sequences by their number in the batch, and after which of these each is."""
    draws: list[Draw] = []
    wanted: list[int] = []
    drawn_from: list[int] = []
    for index, sequence in enumerate(batch.sequences):
        for sampling in sequence.draws:
            draws.append(Draw(sampling, sequence.end, sequence.banned_token_ids))
            drawn_from.append(len(wanted))
        if sequence.draws:
            wanted.append(index)
    return draws, wanted, None if len(draws) == len(wanted) else drawn_from


def _followed(batch: Batch) -> list[tuple[int, int]]:
    if all(share.follows is None for share in batch.sequences):
        return []
    ends = accumulate(len(share.token_ids) for share in batch.sequences)
    pairs = zip(ends, batch.sequences, strict=True)
    return [(end - 1, share.follows) for end, share in pairs if share.follows is not None]
