"""The Triton kernels' work of one step in a fixed order: as `kernels.work_list`, for deterministic mode.

Knows numbers only. Invariant: a token's parts are cut at multiples of `Tuning.part` positions from its sequence's start
and are merged in their order, the sinks' first, whatever else is in the step; all of them are wide items, because what
one step decodes another computes as a part of a prompt.
"""

from __future__ import annotations

import numpy as np

from kernels.configs import Tuning
from kernels.step import Ints, Step
from kernels.work_list import (
    COUNT,
    END,
    FIRST,
    FULL,
    SINKS,
    SLOT,
    START,
    TILE,
    WorkList,
    check_holes,
    expanded,
    tiles_of,
)


def fixed_work_list(step: Step, num_heads: int, window: int | None, sinks: int, tuning: Tuning) -> WorkList:
    """Plan layers with this window. Raises ValueError where a table has a hole that is read."""
    check_holes(step, window, sinks)
    group = num_heads // step.num_kv_heads
    rows = max(tuning.wide.rows, 1 << (group - 1).bit_length())
    tiles, known = [np.zeros((0, 12), dtype=np.int64)], 0
    for sequence in range(len(step.query_lens)):
        made = tiles_of(step, sequence, window, sinks, rows // group)
        made[:, TILE] += known
        known = int(made[:, TILE].max()) + 1
        tiles.append(made)
    return _assembled(step, _parts(np.concatenate(tiles), -(-tuning.part // tuning.wide.tile) * tuning.wide.tile), rows)


def _parts(spans: Ints, size: int) -> Ints:
    """Cut at multiples of `size`; of a tile the sinks come first, then what is nearer. Assigns slots."""
    spans = spans[np.lexsort((-spans[:, SINKS], spans[:, TILE]))]
    first = spans[:, START] // size
    owner, number = expanded(-(-spans[:, END] // size) - first)
    parts = spans[owner]
    begin = (first[owner] + number) * size
    parts[:, START] = parts[:, FULL] = np.maximum(parts[:, START], begin)
    parts[:, END] = np.minimum(parts[:, END], begin + size)
    several = np.bincount(parts[:, TILE])[parts[:, TILE]] > 1
    needed = parts[:, COUNT] * several
    parts[:, SLOT] = np.where(several, np.cumsum(needed) - needed, -1)
    return parts


def _assembled(step: Step, parts: Ints, rows: int) -> WorkList:
    """Give every token of several parts the list of them, in order."""
    partial = parts[parts[:, SLOT] >= 0]
    owner, number = expanded(partial[:, COUNT])
    token, slot = partial[owner, FIRST] + number, partial[owner, SLOT] + number
    order = np.argsort(token, kind="stable")
    tokens, first, count = np.unique(token[order], return_index=True, return_counts=True)
    return WorkList(
        decode=np.zeros((0, 8), dtype=np.int64),
        wide=parts,
        tokens=np.arange(step.num_tokens),
        part_slots=slot[order],
        merges=np.stack((tokens, first, count), axis=1),
        num_slots=len(slot),
        rows=rows,
    )
