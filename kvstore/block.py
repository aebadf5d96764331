"""Names and errors of KV blocks.

Knows nothing of tensors, sequences or tenants. A block id names a place, a block key names content.
"""

from __future__ import annotations

from typing import NewType

BlockId = NewType("BlockId", int)
"""Index of a block in its pool, 0 <= id < num_blocks."""

BlockKey = NewType("BlockKey", bytes)
"""16 bytes that name a full block and all blocks before it. A hint, never proof."""

WorkerId = NewType("WorkerId", str)
"""Name of a worker in its fleet, kept over restarts."""

NO_BLOCK = BlockId(-1)
"""The parent of a block that begins a sequence."""


class BrokenInvariant(RuntimeError):
    """The block store was used wrongly or contradicts itself: a defect of the caller, never of a request."""
