"""A step as native code takes it: tables as they are, and whose queries go through the cache together.

Knows lengths and tables. Invariant: the order of a row's sum does not depend on its team.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels import plan as host_plan
from kernels.cpu_calls import Teams, num_threads
from kernels.step import Ints, Step

# Query rows (tokens times heads of a group) that one piece of a prompt has, and the most of a team's.
ROWS = 256


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """`members` are pieces of sequences: the sequence, its first row in the step, rows, and position. Team i is the
    members from `teams[i]` to the next; those of a team begin with the same blocks, in order of their tables."""

    num_tokens: int
    sink_work: dict[int, host_plan.SinkWork]  # empty: a plan with sinks is the reference's
    slots: torch.Tensor  # [num_tokens] int64
    tables: npt.NDArray[np.int32]  # [num_seqs, max_blocks]
    members: Ints  # [num_members, 4]
    teams: Ints  # [num_teams + 1]
    most_rows: int

    def struct(self) -> Teams:
        """As native code takes it, while the plan lives."""
        pointers = (self.tables.ctypes.data, self.members.ctypes.data, self.teams.ctypes.data)
        return Teams(*pointers, len(self.teams) - 1, self.most_rows, self.tables.shape[1])


def make_plan(step: Step, windows: Sequence[int | None], *, num_heads: int) -> CpuPlan:
    """Raises ValueError on a hole where the step reads or writes: native code would follow it."""
    for window in dict.fromkeys(windows):
        _check_tables(step, window)
    most = max(1, ROWS * step.num_kv_heads // num_heads)
    members, sizes = _prompt_pieces(step, most)
    if (single := np.flatnonzero(step.query_lens == 1)).size:
        order, decode_sizes = _decode_teams(step.block_tables, single, _fair_share(step, len(single), most))
        rows = (order, step.query_starts[order], np.ones_like(order), step.context_lens[order] - 1)
        members = np.concatenate((members, np.stack(rows, axis=1)))
        sizes = np.concatenate((sizes, decode_sizes))
    members, sizes = _longest_first(members, sizes)
    teams = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=teams[1:])
    return CpuPlan(
        num_tokens=step.num_tokens,
        sink_work={},
        slots=torch.from_numpy(step.slots()),
        tables=step.block_tables,
        members=np.ascontiguousarray(members),
        teams=teams,
        most_rows=int(np.add.reduceat(members[:, 2], teams[:-1]).max()),
    )


def _fair_share(step: Step, decoding: int, most: int) -> int:
    """How many sequences a team may have so that no thread is without one."""
    return min(most, -(-decoding * step.num_kv_heads // num_threads()))


def _prompt_pieces(step: Step, most: int) -> tuple[Ints, Ints]:
    """Pieces of at most `most` tokens of the sequences that compute several, [num_pieces, 4], teams of one."""
    pieces = np.where(step.query_lens > 1, -(-step.query_lens // most), 0)
    sequence = np.repeat(np.arange(len(pieces)), pieces)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    rows = np.minimum(step.query_lens[sequence] - begin, most)
    position = (step.context_lens - step.query_lens)[sequence] + begin
    members = np.stack((sequence, step.query_starts[sequence] + begin, rows, position), axis=1)
    return members, np.ones(len(members), dtype=np.int64)


def _decode_teams(tables: npt.NDArray[np.int32], single: Ints, most: int) -> tuple[Ints, Ints]:
    """The sequences `single`, which compute one token, in order of their tables, and how many are in each team: those
    that begin with the same block, `most` at once."""
    order = sorted(single.tolist(), key=lambda row: tables[row].tobytes())
    sizes: list[int] = []
    before = None
    for first in tables[order, 0].tolist():
        if first == before and sizes[-1] < most:
            sizes[-1] += 1
        else:
            sizes.append(1)
        before = first
    return np.array(order), np.array(sizes)


def _longest_first(members: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """The teams in order of their work, so that no thread is left with a long one at the end."""
    if len(sizes) == 1:
        return members, sizes
    starts = np.cumsum(sizes) - sizes
    work = np.add.reduceat(members[:, 2] * (members[:, 3] + members[:, 2]), starts)
    order = np.argsort(-work, kind="stable")
    moved = np.repeat(starts[order], sizes[order])
    within = np.arange(len(members)) - np.repeat(np.cumsum(sizes[order]) - sizes[order], sizes[order])
    return members[moved + within], sizes[order]


def _check_tables(step: Step, window: int | None) -> None:
    seen = step.seen(window)
    column = np.arange(step.block_tables.shape[1])[None, :]
    read = (column >= (seen.first // step.block_size)[:, None]) & (column * step.block_size < seen.end[:, None])
    if (step.block_tables[read] < 0).any():
        raise ValueError("a block table has a hole where it is read")
