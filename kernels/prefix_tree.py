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
    if len(tables) < 2 or len(np.unique(tables[:, 0])) == len(tables):
        return []
    order, common = _sorted_rows(tables, lengths)
    chosen: list[Node] = []
    saved = 0.0
    pending = [(0, len(order), 0)]
    while pending:
        low, high, first = pending.pop()
        end = int(common[low + 1 : high].min())
        cuts = (np.flatnonzero(common[low + 1 : high] == end) + low + 1).tolist()
        if end > first:
            gain = _gain(high - low, end - first, shape, tuning)
            if gain > 0 or tuning.share:
                chosen.append(Node(np.sort(order[low:high]), first, end))
                saved, first = saved + gain, end
        edges = [low, *cuts, high]
        pending += [(a, b, first) for a, b in pairwise(edges) if b - a > 1]
    return chosen if saved > tuning.processor.launch or tuning.share else []


def _sorted_rows(tables: npt.NDArray[np.int32], lengths: Ints) -> tuple[Ints, Ints]:
    """An order that puts rows with a common beginning together, and how many blocks each has in common with the row
    before it (0 for the first)."""
    width = max(1, int(lengths.max()))
    rows = np.array(tables[:, :width], dtype=np.int32)
    # What may not be shared is made unlike everything else.
    own, column = np.nonzero(np.arange(width)[None, :] >= lengths[:, None])
    rows[own, column] = -2 - own
    order = np.argsort(rows.astype(">i4").view(f"V{4 * width}").ravel(), kind="stable")
    rows = rows[order]
    differs = rows[1:] != rows[:-1]
    common = np.where(differs.any(1), differs.argmax(1), width)
    return order, np.concatenate(([0], common))


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
