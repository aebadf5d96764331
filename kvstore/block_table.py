"""The block table of one sequence: finds its cached prefix, grows with it, seals what is full, gives all back.

Knows nothing of scheduling or text. Invariant: `block_ids` only grows until `release`; the block at index i holds
positions [i * block_size, (i + 1) * block_size).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvstore.block import NO_BLOCK, BlockId, BrokenInvariant
from kvstore.block_key import TOKEN_BYTES, KeyChain, token_bytes
from kvstore.block_pool import BlockPool
from kvstore.scope import Region


class BlockTable:
    """Blocks of one sequence, whose tokens are keyed in `regions`. With `no_store` it reads the cache and adds nothing.

    After `release` the table is empty and may be used again for the same sequence.
    """

    __slots__ = ("_chain", "_no_store", "_pool", "_sealing", "_stand_ins", "_tip", "block_ids", "cached_published")

    def __init__(self, pool: BlockPool, regions: Sequence[Region], *, no_store: bool = False) -> None:
        self._pool = pool
        self._no_store = no_store
        self._chain = KeyChain(regions, pool.block_size, key_bits=pool.key_bits)
        self._reset()

    def _reset(self) -> None:
        self.block_ids: list[int] = []
        self.cached_published = 0
        """Attached tokens that belong to regions other than the last one."""
        self._sealing = self._pool.reuse and not self._no_store
        self._chain.restart()
        # The sealed block that stands for everything before the next block to seal.
        self._tip = NO_BLOCK
        # (index, block): sealed by another sequence with the content of our private block at that index. Held, so that
        # the parents of what we seal later stay resident.
        self._stand_ins: list[tuple[int, BlockId]] = []

    def attach_prefix(self, token_ids: array[int], limit: int) -> int:
        """Hold the longest cached prefix of `token_ids` in at most `limit` tokens; how many tokens that is.

        Only for an empty table. Scope, parent and token ids of every block are compared.
        """
        if self.block_ids:
            raise BrokenInvariant("a prefix can be attached to an empty table only")
        pool, chain = self._pool, self._chain
        if not pool.reuse:
            return 0
        size = pool.block_size
        data = token_bytes(token_ids)
        step = size * TOKEN_BYTES
        found: list[BlockId] = []
        published = 0
        for offset in range(0, min(limit, len(token_ids)) // size * step, step):
            tokens = data[offset : offset + step]
            key = chain.peek(tokens)
            block = pool.find(key, chain.root, self._tip, tokens)
            if block is None:
                break
            published += not chain.in_last_region
            chain.advance(key)
            found.append(block)
            self._tip = block
        pool.acquire(found)
        self.block_ids.extend(found)
        self.cached_published = published * size
        return len(found) * size

    def reserve(self, num_tokens: int) -> bool:
        """Grow to cover `num_tokens` positions; False and no change if the pool has too few blocks."""
        missing = -(-num_tokens // self._pool.block_size) - len(self.block_ids)
        if missing <= 0:
            return True
        blocks = self._pool.allocate(missing)
        if blocks is None:
            return False
        self.block_ids.extend(blocks)
        return True

    def seal(self, token_ids: array[int], num_computed: int) -> None:
        """Make blocks findable that became full: `token_ids` are the sequence's, `num_computed` of them are in KV."""
        pool, chain = self._pool, self._chain
        size = pool.block_size
        full = num_computed // size
        if not self._sealing or chain.index >= full:
            return
        if num_computed > len(token_ids) or full > len(self.block_ids):
            raise BrokenInvariant("more positions are sealed than the sequence has")
        for index in range(chain.index, full):
            block = BlockId(self.block_ids[index])
            tokens = token_bytes(token_ids[index * size : (index + 1) * size])
            key = chain.peek(tokens)
            resident = pool.seal(block, key, chain.root, self._tip, tokens)
            if resident is None:
                self._sealing = False  # nothing behind this block could be found
                return
            if resident != block:
                pool.acquire((resident,))
                self._stand_ins.append((index, resident))
            chain.advance(key)
            self._tip = resident

    def release(self) -> None:
        """Give all blocks back, the last ones to be evicted first. Calling it again does nothing."""
        order: list[BlockId] = []
        end = len(self.block_ids)
        for index, stand_in in reversed(self._stand_ins):
            order += self._backwards(index, end)
            order.append(stand_in)
            end = index
        order += self._backwards(0, end)
        self._pool.release(order)
        self._reset()

    def _backwards(self, first: int, end: int) -> list[BlockId]:
        return self.block_ids[first:end][::-1]  # type: ignore[return-value]
