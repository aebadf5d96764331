"""A batch as arrays: what a step needs to know before it runs.

Knows numbers only. Nothing of the batch is read after they are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from worker.batch import Batch, BlockCopy
from worker.runner import ModelSpec
from worker.sampler import Draw

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Tokens of all sequences packed in order; copies come first."""

    token_ids: Ints  # [num_tokens]
    positions: Ints  # [num_tokens]
    query_lens: Ints  # [num_seqs]
    query_ends: Ints  # [num_seqs], of num_tokens
    context_lens: Ints  # [num_seqs]
    block_tables: Ints  # [num_seqs, max_blocks]
    copies: tuple[BlockCopy, ...]
    draws: list[Draw]
    wanted: Ints  # after which of the sequences something is drawn
    drawn_from: Ints | None  # [num_draws]: after which of `wanted` each is; None: after each of them one
    followed: Ints  # [num_followed, 2]: which of the packed tokens the step before draws, and as which draw


def step_inputs(batch: Batch, spec: ModelSpec) -> StepInputs:
    """All index arrays of a step, each made in one go."""
    sequences = batch.sequences
    query_lens = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.int64)
    query_ends = np.cumsum(query_lens)
    tokens = chain.from_iterable(sequence.token_ids for sequence in sequences)
    token_ids = np.fromiter(tokens, np.int64, query_ends[-1])
    starts = np.array([sequence.start for sequence in sequences], dtype=np.int64)
    context_lens = starts + query_lens
    draws, wanted, drawn_from = _draws(batch)
    return StepInputs(
        token_ids=token_ids,
        positions=np.arange(len(token_ids)) + np.repeat(starts - query_ends + query_lens, query_lens),
        query_lens=query_lens,
        query_ends=query_ends,
        context_lens=context_lens,
        block_tables=_block_tables(batch, context_lens, spec),
        copies=batch.copies,
        draws=draws,
        wanted=wanted,
        drawn_from=drawn_from,
        followed=_followed(batch, query_ends),
    )


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


def _block_tables(batch: Batch, context_lens: Ints, spec: ModelSpec) -> Ints:
    widths = (-(-context_lens // spec.block_size)).tolist()
    block_tables = np.full((len(batch.sequences), max(widths)), -1, dtype=np.int64)
    for row, (sequence, width) in enumerate(zip(batch.sequences, widths, strict=True)):
        sinks, first = _read_blocks(sequence.start, spec)
        if first > sinks:
            block_tables[row, :sinks] = sequence.block_ids[:sinks]
        else:
            first = 0
        block_tables[row, first:width] = sequence.block_ids[first:width]
    return block_tables


def _read_blocks(start: int, spec: ModelSpec) -> tuple[int, int]:
    """A step from position `start` on reads so many first blocks, and those from the second number on."""
    first = 0 if spec.window is None else max(0, start - spec.window + 1) // spec.block_size
    return -(-spec.sinks // spec.block_size), first


def _draws(batch: Batch) -> tuple[list[Draw], Ints, Ints | None]:
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
    forked = None if len(draws) == len(wanted) else np.array(drawn_from, dtype=np.int64)
    return draws, np.array(wanted, dtype=np.int64), forked


def _followed(batch: Batch, query_ends: Ints) -> Ints:
    shares = enumerate(batch.sequences)
    pairs = [(query_ends[at] - 1, share.follows) for at, share in shares if share.follows is not None]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)
