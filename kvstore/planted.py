"""A prefix that every worker plants in the index and every router looks for there.

Knows no index. Invariant: both ends make its keys from what they know themselves, so that it is found only if they name
blocks alike and what a worker publishes reaches a router. Mismatched seeds or block sizes would else be silent misses.
"""

from __future__ import annotations

import hashlib
from array import array

from kvstore.block import BlockKey
from kvstore.block_key import block_keys, key_fingerprint
from kvstore.scope import Region, ScopeRoot, frame

_NUM_BLOCKS = 2


def planted_keys(model_fingerprint: bytes, block_size: int) -> list[BlockKey]:
    """The keys of a prompt that nobody can send: its scope is derived from the key fingerprint, without the secret."""
    message = frame("planted", key_fingerprint(model_fingerprint, block_size).encode())
    root = ScopeRoot(hashlib.blake2b(message, digest_size=16, person=b"pando.planted").digest())
    return block_keys([Region(root, None)], array("I", range(_NUM_BLOCKS * block_size)), block_size)
