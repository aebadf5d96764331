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
    group = num_heads // step.num_kv_heads
    most = max(1, ROWS // group)
    pieces = _prompt_pieces(step, most)
    teams = [pieces[index : index + 1] for index in range(len(pieces))]
    teams += _decode_teams(step, _fair_share(step, most))
    teams.sort(key=lambda team: -int((team[:, 2] * (team[:, 3] + team[:, 2])).sum()))
    sizes = [len(team) for team in teams]
    return CpuPlan(
        num_tokens=step.num_tokens,
        sink_work={},
        slots=torch.from_numpy(step.slots()),
        tables=step.block_tables,
        members=np.ascontiguousarray(np.concatenate(teams)) if teams else np.zeros((0, 4), np.int64),
        teams=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
        most_rows=max((int(team[:, 2].sum()) for team in teams), default=1),
    )


def _fair_share(step: Step, most: int) -> int:
    """How many sequences a team may have so that no thread is without one."""
    decoding = int((step.query_lens == 1).sum())
    return min(most, -(-decoding * step.num_kv_heads // num_threads()))


def _prompt_pieces(step: Step, most: int) -> Ints:
    """Pieces of at most `most` tokens of the sequences that compute several: [num_pieces, 4]."""
    pieces = np.where(step.query_lens > 1, -(-step.query_lens // most), 0)
    sequence = np.repeat(np.arange(len(pieces)), pieces)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    rows = np.minimum(step.query_lens[sequence] - begin, most)
    position = (step.context_lens - step.query_lens)[sequence] + begin
    return np.stack((sequence, step.query_starts[sequence] + begin, rows, position), axis=1)


def _decode_teams(step: Step, most: int) -> list[Ints]:
    """Sequences that compute one token, those that begin with the same block together, `most` in a team."""
    single = np.flatnonzero(step.query_lens == 1)
    tables = step.block_tables
    order = sorted(single.tolist(), key=lambda row: tables[row].tobytes())
    teams: list[list[int]] = []
    for row in order:
        if teams and len(teams[-1]) < most and tables[teams[-1][-1], 0] == tables[row, 0]:
            teams[-1].append(row)
        else:
            teams.append([row])
    ones = np.ones(1, dtype=np.int64)
    return [
        np.stack((rows, step.query_starts[rows], ones.repeat(len(rows)), step.context_lens[rows] - 1), axis=1)
        for rows in map(np.array, teams)
    ]


def _check_tables(step: Step, window: int | None) -> None:
    seen = step.seen(window)
    column = np.arange(step.block_tables.shape[1])[None, :]
    read = (column >= (seen.first // step.block_size)[:, None]) & (column * step.block_size < seen.end[:, None])
    if (step.block_tables[read] < 0).any():
        raise ValueError("a block table has a hole where it is read")
