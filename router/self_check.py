"""Looks for the prefix that each worker has planted in the index, with the keys that this router makes itself.

Knows no network. Invariant: a worker whose index was read either has it in full, or is counted and named once a life.
"""

from __future__ import annotations

import logging

from kvstore.block import WorkerId
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.planted import planted_keys

logger = logging.getLogger(__name__)


class SelfCheck:
    """Call it whenever a worker's blocks were read anew."""

    def __init__(self, index: MemoryIndex, block_size: int) -> None:
        self._index = index
        self._block_size = block_size
        self._unfound: dict[WorkerId, int] = {}

    @property
    def num_unfound(self) -> int:
        """Workers whose planted prefix was not found when it was last looked for."""
        return len(self._unfound)

    def __call__(self, worker: WorkerId, lease: Lease) -> None:
        try:
            keys = planted_keys(bytes.fromhex(lease.model_fingerprint), self._block_size)
        except ValueError:
            keys = []
        found = self._index.match(keys).get(worker)
        if keys and found is not None and found.num_blocks == len(keys):
            self._unfound.pop(worker, None)
        elif self._unfound.get(worker) != lease.epoch:
            self._unfound[worker] = lease.epoch
            logger.error("worker %s planted a prefix that this router cannot find: it gets no hits there", worker)
