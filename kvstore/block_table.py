"""The block table of one sequence: finds its cached prefix, grows with it, seals what is full, gives all back.

Knows nothing of scheduling or text. Invariants: the block at index i holds positions [i * block_size,
(i + 1) * block_size), and a position is written only in a block that this table alone holds and nobody can find.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from kvstore.block import NO_BLOCK, BlockId, BrokenInvariant, CopyOrder
from kvstore.block_key import TOKEN_BYTES, KeyChain, token_bytes
from kvstore.block_pool import BlockPool
from kvstore.children import common_bytes
from kvstore.flights import Flight, Wait
from kvstore.scope import Region


class Part(NamedTuple):
    """The start of a block that another sealed block holds too."""

    source: BlockId
    num_tokens: int
    published: bool


class BlockTable:
    """Blocks of one sequence, whose tokens are keyed in `regions`. With `no_store` it reads the cache and adds nothing.

    After `release` the table is empty and may be used again for the same sequence.
    """

    __slots__ = (
        "_chain", "_copies", "_data", "_flight", "_hole_end", "_no_store", "_pool", "_regions", "_sealing", "_sources",
        "_stand_ins", "_tip", "block_ids", "cached_published", "life", "pending",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, regions: Sequence[Region], *, no_store: bool = False) -> None:
        self.life = 0
        """Grows with each `release`."""
        self._pool = pool
        self._regions = tuple(regions)
        self._no_store = no_store
        self._chain = KeyChain(regions, pool.block_size, key_bits=pool.key_bits)
        self._reset()

    def _reset(self) -> None:
        self.block_ids: list[int] = []
        self.cached_published = 0
        """Attached tokens that belong to regions other than the last one."""
        self.pending: Wait | None = None
        """Another sequence is about to seal what comes after the attached prefix."""
        self._sealing = self._pool.reuse and not self._no_store
        self._chain.restart()
        # The sealed block that stands for everything before the next block to seal.
        self._tip = NO_BLOCK
        # (index, block): sealed by another sequence with the content of our private block at that index. Held, so that
        # the parents of what we seal later stay resident.
        self._stand_ins: list[tuple[int, BlockId]] = []
        self._copies: list[CopyOrder] = []  # not yet taken
        self._sources: list[BlockId] = []  # held until their copies are done
        self._data = b""  # token ids to lead a flight with
        self._flight: Flight | None = None
        self._hole_end = 0

    # What is cached

    def attach_prefix(self, token_ids: array[int], limit: int) -> int:
        """Hold the longest cached prefix of `token_ids` in at most `limit` tokens; how many tokens that is.

        Only for an empty table. Scope, parent and token ids of every block are compared. The last block may be our own,
        to be filled by a copy order; not so if `pending` is set, when more is worth waiting for.
        """
        num_tokens = self.attach_blocks(token_ids, limit)
        if self.watch(token_ids) is None:
            num_tokens += self.attach_part(num_tokens, limit)
        return num_tokens

    def attach_blocks(self, token_ids: array[int], limit: int, *, hit: bool = True) -> int:
        """As `attach_prefix`, in full blocks only: nothing to copy and nothing to wait for. `hit`: it counts as use."""
        if self.block_ids:
            raise BrokenInvariant("a prefix can be attached to an empty table only")
        pool = self._pool
        if not pool.reuse:
            return 0
        found, published = self._find_blocks(token_bytes(token_ids), min(limit, len(token_ids)))
        if found and not pool.may_acquire(found):
            self._chain.restart()
            self._tip = NO_BLOCK
            return 0
        pool.acquire(found, hit=hit)
        self._hold(found)
        self.cached_published = published * pool.block_size
        return len(found) * pool.block_size

    def _find_blocks(self, data: bytes, limit: int) -> tuple[list[BlockId], int]:
        """The cached full blocks from the start, and how many of them are published; the chain goes behind them."""
        pool, chain, contents = self._pool, self._chain, self._pool.contents
        step = pool.block_size * TOKEN_BYTES
        found: list[BlockId] = []
        published = number = 0
        for offset in range(0, limit // pool.block_size * step, step):
            tokens = data[offset : offset + step]
            key = chain.peek(tokens)
            block = contents.find(key, chain.root, number, tokens)
            if block is None:
                break
            published += not chain.in_last_region
            chain.advance(key)
            number = contents.numbers[block]
            found.append(block)
            self._tip = block
        return found, published

    def attach_part(self, start: int, limit: int) -> int:
        """Behind `start` attached tokens, copy the start of the next block from the sealed one that shares most of it.

        How many tokens that is; of the token ids that `watch` was told.
        """
        limit = min(limit, len(self._data) // TOKEN_BYTES)
        part = self._best_part(start, limit) if start < limit else None
        if part is None or not self._pool.may_acquire((part.source,)):
            return 0
        self._pool.acquire((part.source,), hit=True)
        blocks = self._pool.allocate(1, self._regions[-1].root, alone=self._is_alone)
        if blocks is None:
            self._pool.release((part.source,))
            return 0
        self._hold(blocks)
        self._order_copy(part.source, blocks[0], part.num_tokens)
        if part.published:
            self.cached_published += part.num_tokens
        return part.num_tokens

    def cursor(self) -> tuple[KeyChain, int]:
        """Where the attached prefix ends: a chain to go on with, and the number of the last content."""
        return self._chain.copy(), self._pool.number(self._tip)

    def _best_part(self, start: int, limit: int) -> Part | None:
        """The longest start of the next block in the scopes of the regions that lie in it, each up to its own end.

        Never all of the block: it would be ours, full and not sealed. KV of a position depends on the tokens up to it
        alone, so what the source holds behind the part, in whoever's hands, neither matters nor can be read.
        """
        size = self._pool.block_size
        contents, number = self._pool.contents, self._pool.number(self._tip)
        best: Part | None = None
        for region in self._regions:
            if region.end is not None and region.end <= start:
                continue
            end = min(limit, start + size - 1, limit if region.end is None else region.end)
            found = contents.closest(region.root, number, self._data[start * TOKEN_BYTES : end * TOKEN_BYTES])
            length = found[1] // TOKEN_BYTES if found else 0
            if found and length > (best.num_tokens if best else 0):
                best = Part(found[0], length, region.end is not None)
            if region.end is None or region.end >= start + size:
                break
        return best

    # Single flight

    def watch(self, token_ids: array[int]) -> Wait | None:
        """What to wait for, if another sequence is at the block that we miss next; `pending` says it again.

        Without one, our next `reserve` makes us the leader that others wait for.
        """
        self.pending = None
        if not self._pool.reuse:
            return None
        self._data = token_bytes(token_ids)
        chain, size = self._chain, self._pool.block_size
        start = chain.index * size
        tokens = self._block_at(start)
        if not tokens or not len(self._pool.flights):
            return None
        flight = self._pool.flights.find(chain.peek(tokens), chain.root, self._pool.number(self._tip))
        if flight is None:
            return None
        offset = start * TOKEN_BYTES
        common = common_bytes(flight.data[offset:], self._data[offset:]) // len(tokens)
        if not common:
            return None
        target = chain.index + common
        if flight.regions != self._regions and chain.span_end is not None:
            target = min(target, chain.span_end)
        self.pending = Wait(flight, target)
        return self.pending

    def _block_at(self, start: int) -> bytes:
        """The known tokens of the full block from this position on; nothing if they are fewer."""
        step = self._pool.block_size * TOKEN_BYTES
        tokens = self._data[start * TOKEN_BYTES : start * TOKEN_BYTES + step]
        return tokens if len(tokens) == step else b""

    def _lead(self) -> None:
        """Tell others which block we seal next, as long as its tokens are known."""
        chain = self._chain
        tokens = self._block_at(chain.index * self._pool.block_size) if self._sealing else b""
        if tokens:
            self._flight = self._flight or Flight(self._regions, self._data)
            number = self._pool.number(self._tip)
            self._pool.flights.advance(self._flight, chain.index, chain.peek(tokens), chain.root, number)
            return
        self._data = b""
        if self._flight is not None:
            self._pool.flights.end(self._flight, chain.index)
            self._flight = None

    # Growth

    def reserve(self, num_tokens: int) -> bool:
        """Grow to cover `num_tokens` positions; False and no change if the pool has too few blocks for us."""
        missing = -(-num_tokens // self._pool.block_size) - len(self.block_ids)
        if missing > 0:
            blocks = self._pool.allocate(missing, self._regions[-1].root, alone=self._is_alone)
            if blocks is None:
                return False
            self._hold(blocks)
        if self._flight is None and self._data:
            self._lead()
        return True

    def prepare_write(self, start: int, end: int) -> bool:
        """Make positions [start, end), which are reserved, ours to write; False and no change if blocks are missing.

        A block that others hold too is replaced by one of our own, with a copy order for what comes before `start`.
        """
        pool, size = self._pool, self._pool.block_size
        if end > len(self.block_ids) * size:
            raise BrokenInvariant("positions are written before they are reserved")
        indices = range(start // size, -(-end // size))
        shared = [index for index in indices if not pool.is_writable(BlockId(self.block_ids[index]))]
        if not shared:
            return True
        if start < self._chain.index * size:
            raise BrokenInvariant("sealed positions are never written again")
        blocks = pool.allocate(len(shared), self._regions[-1].root, alone=self._is_alone)
        if blocks is None:
            return False
        for index, block in zip(shared, blocks, strict=True):
            source = BlockId(self.block_ids[index])
            self.block_ids[index] = block
            if start > index * size:
                self._order_copy(source, block, start - index * size)
            else:
                pool.release((source,))
        return True

    def fork(self, num_computed: int) -> BlockTable:
        """A table of a sequence that has the first `num_computed` positions in common with ours; seal first.

        It holds the same blocks, the last partial one too: who writes to that first, copies it.
        """
        if self._sources or num_computed < self._chain.index * self._pool.block_size:
            raise BrokenInvariant("a table is forked behind what is sealed, and with no copies to be done")
        twin = BlockTable(self._pool, self._regions, no_store=self._no_store)
        shared = self.block_ids[: -(-num_computed // self._pool.block_size)]
        self._pool.acquire([BlockId(block) for block in shared if block != NO_BLOCK])
        self._pool.acquire([block for _, block in self._stand_ins])
        twin._hold(shared)
        twin._chain = self._chain.copy()
        twin._sealing, twin._tip, twin._hole_end = self._sealing, self._tip, self._hole_end
        twin._stand_ins = list(self._stand_ins)
        return twin

    def seal(self, token_ids: array[int], num_computed: int) -> None:
        """Make blocks findable that became full: `token_ids` are the sequence's, `num_computed` of them are in KV."""
        full = num_computed // self._pool.block_size
        if not self._sealing or self._chain.index >= full:
            return
        if num_computed > len(token_ids) or full > len(self.block_ids):
            raise BrokenInvariant("more positions are sealed than the sequence has")
        for index in range(self._chain.index, full):
            if not self._seal_block(index, token_ids):
                self._sealing = False  # nothing behind this block could be found
                break
        if self._flight is not None:
            self._lead()

    def _seal_block(self, index: int, token_ids: array[int]) -> bool:
        pool, chain, size = self._pool, self._chain, self._pool.block_size
        if self._tip != NO_BLOCK and not pool.is_sealed(self._tip):
            return False  # purged meanwhile
        block = BlockId(self.block_ids[index])
        tokens = token_bytes(token_ids[index * size : (index + 1) * size])
        key = chain.peek(tokens)
        resident = pool.seal(block, key, chain.root, self._tip, tokens)
        if resident is None:
            return False
        if resident != block:
            if not pool.may_acquire((resident,)):
                return False
            pool.acquire((resident,))
            self._stand_ins.append((index, resident))
        chain.advance(key)
        self._tip = resident
        return True

    # Copies

    def take_copies(self) -> list[CopyOrder]:
        """Copies to carry out before the next step writes."""
        copies, self._copies = self._copies, []
        return copies

    def copies_done(self) -> None:
        """The copies taken so far were carried out."""
        if self._sources:
            kept = [order.source for order in self._copies]
            done = self._sources[: len(self._sources) - len(kept)]
            self._sources = kept
            self._pool.release(done)

    def _order_copy(self, source: BlockId, target: BlockId, num_tokens: int) -> None:
        """`source` is held already, and stays so until the copy is done."""
        self._sources.append(source)
        self._copies.append(CopyOrder(source, target, num_tokens))

    # Giving back

    def release_before(self, position: int, *, sinks: int = 0) -> int:
        """Positions before `position` are never read again, but for the first `sinks`; how many blocks that frees.

        Their places in `block_ids` become NO_BLOCK. What is sealed is given up all at once, when the last of it may go:
        a sealed block could not be evicted before those behind it anyway. From here on nothing more is sealed, so a
        sequence holds a bounded number of blocks however long it gets.
        """
        size = self._pool.block_size
        first = max(-(-sinks // size), self._hole_end)
        end = min(position // size, len(self.block_ids))
        if end <= first:
            return 0
        self._sealing = False
        if self._flight is not None:
            self._lead()
        if end < self._chain.index:
            return 0
        kept = [pair for pair in self._stand_ins if pair[0] < first]
        self._stand_ins = [pair for pair in self._stand_ins if pair[0] >= first]
        self._pool.release(self._backwards(first, end))
        self._stand_ins = kept
        self.block_ids[first:end] = [NO_BLOCK] * (end - first)
        self._hole_end = end
        return end - first

    def release(self) -> None:
        """Give all blocks back, the last ones to be evicted first. Calling it again does nothing."""
        if self._flight is not None:
            self._pool.flights.end(self._flight, self._chain.index)
        if self.block_ids:
            self._pool.num_holders -= 1
        self._pool.release([*self._sources, *self._backwards(0, len(self.block_ids))])
        self.life += 1
        self._reset()

    def _backwards(self, first: int, end: int) -> list[BlockId]:
        """Our blocks from the last to the first, each stand-in behind the block that it stands for."""
        order: list[int] = []
        for index, stand_in in reversed(self._stand_ins):
            order += self.block_ids[index:end][::-1]
            order.append(stand_in)
            end = index
        order += self.block_ids[first:end][::-1]
        return [BlockId(block) for block in order if block != NO_BLOCK] if self._hole_end else order  # type: ignore[return-value]

    def _hold(self, blocks: Sequence[int]) -> None:
        """Append blocks that we hold."""
        if blocks and not self.block_ids:
            self._pool.num_holders += 1
        self.block_ids.extend(blocks)

    @property
    def _is_alone(self) -> bool:
        return self._pool.num_holders == bool(self.block_ids)
