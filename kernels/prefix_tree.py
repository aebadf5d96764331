"""Which blocks several sequences of a step have in common, and whether it pays to read those once for all of them.

Knows block numbers only: sequences share a prefix if and only if their tables begin with the same blocks. Invariant:
a block is in at most one node on a sequence's path, and the nodes on a path follow one another without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kernels.configs import Tuning
from kernels.step import Ints

# Compared at once to begin with, and more where these are equal.
FEW_COLUMNS = 64


@dataclass(frozen=True, slots=True)
class Node:
    """Rows of the table that have blocks [first, end) in common, and all blocks before them."""

    rows: Ints
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that the cost of attention over one block depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    itemsize: int

    @property
    def block_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * self.itemsize


def shared_nodes(tables: npt.NDArray[np.int32], lengths: Ints, shape: Shape, tuning: Tuning) -> list[Node]:
    """The nodes worth a reading of their own. Of row i of `tables` the first `lengths[i]` blocks may be shared.

    A node is worth it where the model says so, and all together must save more than the launch they need. What a
    node that is not would have read is left to those below it.
    """
    chosen: list[Node] = []
    saved = 0.0
    pending = [(rows, 0, 0) for rows in _alike(tables, np.arange(len(tables)), lengths, 0)]
    while pending:
        rows, first, known = pending.pop()
        end = _common(tables, rows, int(lengths[rows].min()), known)
        gain = _gain(len(rows), end - first, shape, tuning)
        if gain > 0 or tuning.share:
            chosen.append(Node(rows, first, end))
            saved, first = saved + gain, end
        pending += [(below, first, end) for below in _alike(tables, rows, lengths, end)]
    return chosen if saved > tuning.processor.launch or tuning.share else []


def _alike(tables: npt.NDArray[np.int32], rows: Ints, lengths: Ints, column: int) -> list[Ints]:
    """Those of the rows that have the same block in a column, where it may be shared: groups of two or more."""
    rows = rows[lengths[rows] > column]
    if len(rows) < 2:
        return []
    blocks = tables[rows, column]
    order = np.argsort(blocks, kind="stable")
    edges = [0, *(np.flatnonzero(np.diff(blocks[order])) + 1).tolist(), len(rows)]
    return [rows[order[a:b]] for a, b in pairwise(edges) if b - a > 1]


def _common(tables: npt.NDArray[np.int32], rows: Ints, most: int, known: int) -> int:
    """How many first blocks the rows have in common, at most `most`; they are known to have the first `known`."""
    width = FEW_COLUMNS
    while known < most:
        stop = min(known + width, most)
        equal = (tables[rows, known:stop] == tables[rows[0], known:stop]).all(0)
        if not equal.all():
            return known + int(equal.argmin())
        known, width = stop, 4 * width
    return known


def _gain(num_rows: int, num_blocks: int, shape: Shape, tuning: Tuning) -> float:
    """Microseconds saved a layer when so many rows read so many blocks together."""
    processor, wide = tuning.processor, tuning.wide
    kv_bytes = num_blocks * shape.block_bytes
    rate = processor.cache_bytes if kv_bytes <= processor.cache_size else processor.memory_bytes
    plain = kv_bytes / processor.memory_bytes + (num_rows - 1) * kv_bytes / rate
    rows = num_rows * shape.num_heads // shape.num_kv_heads
    tiles = -(-rows // wide.rows)
    keys = num_blocks * shape.block_size
    operations = 4 * tiles * wide.rows * keys * shape.head_dim * shape.num_kv_heads
    reading = kv_bytes / processor.memory_bytes + (tiles - 1) * kv_bytes / rate
    # Each piece leaves a float32 result and state for every row, which is read once more.
    programs = tiles * shape.num_kv_heads
    pieces = max(1, min(-(-processor.multiprocessors // programs), -(-keys // wide.shortest)))
    parts = 2 * pieces * num_rows * shape.num_heads * (shape.head_dim + 1) * 4
    busy = min(1.0, programs * pieces / processor.multiprocessors)
    shared = max(reading, operations / processor.operations) / busy + parts / processor.cache_bytes
    return plain - shared
