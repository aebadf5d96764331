"""A step as native code takes it: tables as they are, and whose queries go through the cache together.

Knows lengths and tables. Invariant: the order of a row's sum does not depend on its team.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels import plan as host_plan
from kernels.cpu_calls import PlanAnswer, PlanOrder, Teams, check, native, num_threads
from kernels.step import Ints

# Query rows (tokens times heads of a group) of a piece of a prompt, and the most of sequences that go together.
ROWS = 256
TEAM_ROWS = 512


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """`members` are pieces of sequences: the sequence, its first row in the step, rows, and position. Team i is the
    members from `teams[i]` to the next; those of a team begin with the same blocks, in order of their tables."""

    num_tokens: int
    sink_work: dict[int, host_plan.SinkWork]  # empty: a plan with sinks is the reference's
    slots: Ints  # [num_tokens]
    tables: npt.NDArray[np.int32]  # [num_seqs, max_blocks]
    members: Ints  # [num_members, 4]
    teams: Ints  # [num_teams + 1]
    most_rows: int
    taken: Ints | None = None
    """Where set, [1]: positions of one head that are read from the cache are added to it."""

    def struct(self) -> Teams:
        """As native code takes it, while the plan lives."""
        pointers = (self.tables.ctypes.data, self.members.ctypes.data, self.teams.ctypes.data)
        taken = None if self.taken is None else self.taken.ctypes.data
        return Teams(*pointers, len(self.teams) - 1, self.most_rows, self.tables.shape[1], taken)


def most_together(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """The most tokens of a piece, and sequences of a team."""
    piece, team = (max(1, rows * num_kv_heads // num_heads) for rows in (ROWS, TEAM_ROWS))
    return piece, team


def make_plan(
    query_lens: Sequence[int] | Ints,
    context_lens: Sequence[int] | Ints,
    block_tables: npt.NDArray[np.integer],
    windows: Sequence[int | None],
    *,
    block_size: int,
    num_heads: int,
    num_kv_heads: int,
) -> CpuPlan:
    """Raises ValueError on lengths that cannot be, and on a hole where the step reads or writes: native code would
    follow it."""
    lens, contexts = (np.ascontiguousarray(numbers, dtype=np.int64) for numbers in (query_lens, context_lens))
    tables = np.ascontiguousarray(block_tables, dtype=np.int64)
    if not len(lens) == len(contexts) == len(tables):
        raise ValueError("each sequence has a query length, a context length and a block table")
    seen = np.array([window or 0 for window in windows], dtype=np.int64)
    piece, team = most_together(num_heads, num_kv_heads)
    num_tokens = int(lens.sum())
    slots, kept = np.empty(max(num_tokens, 0), dtype=np.int64), np.empty(tables.shape, dtype=np.int32)
    room = len(lens) + max(num_tokens, 0) // piece
    members, teams = np.empty((room, 4), dtype=np.int64), np.empty(room + 1, dtype=np.int64)
    of = (
        *(array.ctypes.data for array in (lens, contexts, tables)),
        len(lens),
        num_tokens,
        tables.shape[1],
        block_size,
    )
    order = PlanOrder(*of, seen.ctypes.data, len(seen), piece, team, num_kv_heads, num_threads())
    answer = PlanAnswer(*(array.ctypes.data for array in (slots, kept, members, teams)))
    check(native().pando_plan(ctypes.byref(order), ctypes.byref(answer)))
    count = answer.num_teams
    return CpuPlan(num_tokens, {}, slots, kept, members[: teams[count]], teams[: count + 1], answer.most_rows)
