"""Names, orders and errors of KV blocks.

Knows nothing of tensors, sequences or tenants. A block id names a place, a block key names content.
"""

from __future__ import annotations

from typing import NamedTuple, NewType

BlockId = NewType("BlockId", int)
"""Index of a block in its pool, 0 <= id < num_blocks."""

BlockKey = NewType("BlockKey", bytes)
"""16 bytes that name a sealed block and all blocks before it. A hint, never proof."""

WorkerId = NewType("WorkerId", str)
"""Name of a worker in its fleet, kept over restarts."""

NO_BLOCK = BlockId(-1)
"""The parent of a block that begins a sequence; in a block table the place of a block that was given up."""

NO_CONTENT = 0
"""The content number of a block that is not sealed, and the parent's number of one that begins a sequence."""


class CopyOrder(NamedTuple):
    """Copy the first `num_tokens` positions of block `source` to block `target`, before the step writes anything."""

    source: BlockId
    target: BlockId
    num_tokens: int


class Purged(NamedTuple):
    """What a purge found: blocks freed at once, and blocks in use, which nobody can find any more."""

    freed: int = 0
    held: int = 0


class BrokenInvariant(RuntimeError):
    """The block store was used wrongly or contradicts itself: a defect of the caller, never of a request."""
