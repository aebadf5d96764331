"""The block table of one sequence: finds its cached prefix, grows with it, seals what is full, gives all back.

Knows nothing of scheduling or text. Invariants: the block at index i holds positions [i * block_size,
(i + 1) * block_size), and a position is written only in a block that this table alone holds and nobody can find.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from kvstore.block import NO_BLOCK, BlockId, BlockKey, BrokenInvariant, CopyOrder
from kvstore.block_key import TOKEN_BYTES, KeyChain, token_bytes
from kvstore.block_pool import BlockPool
from kvstore.children import common_bytes
from kvstore.contents import Content
from kvstore.copies import Copies
from kvstore.flights import Flight, Wait
from kvstore.parts import Parts
from kvstore.scope import Region, ScopeRoot


class BlockTable:
    """Blocks of one sequence, whose tokens are keyed in `regions`. With `no_store` it reads the cache and adds nothing.

    After `release` the table is empty and may be used again for the same sequence.
    """

    __slots__ = (
        "_chain", "_copies", "_data", "_flight", "_hole_end", "_no_store", "_parts", "_pool", "_reached", "_regions",
        "_sealing", "_stand_ins", "_tip", "block_ids", "cached_published", "life", "pending",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, regions: Sequence[Region], *, no_store: bool = False) -> None:
        self.life = 0
        """Grows with each `release`."""
        self._pool = pool
        self._regions = tuple(regions)
        self._parts = Parts(regions, pool.contents, pool.block_size)
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
        self._reached = 0  # tokens in KV
        # The sealed block that stands for everything before the next block to seal.
        self._tip = NO_BLOCK
        # (index, block): sealed by another sequence with the content of our private block at that index. Held, so that
        # the parents of what we seal later stay resident.
        self._stand_ins: list[tuple[int, BlockId]] = []
        self._copies = Copies(self._pool)
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
        """As `attach_prefix`, in full blocks only: nothing to copy and nothing to wait for. `hit`: for a sequence, and
        so it counts as use; what nobody else uses it may use, as `allocate` lets it."""
        if self.block_ids:
            raise BrokenInvariant("a prefix can be attached to an empty table only")
        pool = self._pool
        if not pool.reuse:
            return 0
        found, published = self._find_blocks(token_bytes(token_ids), min(limit, len(token_ids)))
        if found and not (hit and self.is_alone) and not pool.may_acquire(found):
            self._chain.restart()
            self._tip = NO_BLOCK
            return 0
        pool.acquire(found, hit=hit)
        self._hold(found)
        self.cached_published = published * pool.block_size
        self._reached = len(found) * pool.block_size
        return self._reached

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
        part = self._parts.best(self._pool.number(self._tip), self._data, start, limit) if start < limit else None
        if part is None or not self._pool.may_acquire((part.source,)):
            return 0
        self._pool.acquire((part.source,), hit=True)
        blocks = self._pool.allocate(1, self._regions[-1].root, alone=self.is_alone)
        if blocks is None:
            self._pool.release((part.source,))
            return 0
        self._hold(blocks)
        self._copies.order(part.source, blocks[0], part.num_tokens)
        self._reached += part.num_tokens
        if part.published:
            self.cached_published += part.num_tokens
        return part.num_tokens

    def cursor(self) -> tuple[KeyChain, int]:
        """Where the attached prefix ends: a chain to go on with, and the number of the last content."""
        return self._chain.copy(), self._pool.number(self._tip)

    def attach_end(self, token_ids: array[int]) -> int:
        """Behind all full blocks of a published head, hold the block itself that others copy the head's end from: for
        a table that is never written. How many tokens that is."""
        start = self._chain.index * self._pool.block_size
        for end in self._parts.ends:
            if start < end.position == len(token_ids) < start + self._pool.block_size:
                block = self._parts.holder(end, self._pool.number(self._tip), token_bytes(token_ids[start:]))
                if block is not None and self._pool.may_acquire((block,)):
                    self._pool.acquire((block,))
                    self._hold((block,))
                    return end.position - start
        return 0

    # Single flight

    def watch(self, token_ids: array[int]) -> Wait | None:
        """What to wait for, if another sequence is at the block that we miss next; `pending` says it again.

        Without one, our next `reserve` makes us the leader that others wait for.
        """
        self.pending = None
        if not self._pool.reuse:
            return None
        self._data = token_bytes(token_ids)
        if not len(self._pool.flights):
            return None
        start, number = self._chain.index * self._pool.block_size, self._pool.number(self._tip)
        for key, root in self._goals(start):
            flight = self._pool.flights.find(key, root, number)
            if flight is None:
                continue
            offset = start * TOKEN_BYTES
            common = start + common_bytes(flight.data[offset:], self._data[offset:]) // TOKEN_BYTES
            target = self._parts.shared_with(flight.regions, common)
            if target > start:
                self.pending = Wait(flight, target)
                break
        return self.pending

    def _goals(self, behind: int) -> Iterator[tuple[BlockKey, ScopeRoot]]:
        """Key and scope of what can be sealed next behind a position, its tokens known: a published end, the block."""
        chain, size = self._chain, self._pool.block_size
        start = chain.index * size
        if self._parts.ends:
            end = self._parts.open_end(self._pool.number(self._tip), self._data, start, behind)
            if end is not None:
                tokens = self._data[start * TOKEN_BYTES : end.position * TOKEN_BYTES]
                yield chain.end_key(end.root, tokens), end.root
        tokens = self._data[start * TOKEN_BYTES : (start + size) * TOKEN_BYTES]
        if len(tokens) == size * TOKEN_BYTES:
            yield chain.peek(tokens), chain.root

    def _lead(self) -> None:
        """Tell others what we seal next, as long as its tokens are known."""
        goal = next(self._goals(self._reached), None) if self._sealing else None
        if goal is not None:
            self._flight = self._flight or Flight(self._regions, self._data)
            self._pool.flights.advance(self._flight, self._num_found, *goal, self._pool.number(self._tip))
            return
        self._data = b""
        self._end_flight()

    def _end_flight(self) -> None:
        if self._flight is not None:
            self._pool.flights.end(self._flight, self._num_found)
            self._flight = None

    @property
    def _num_found(self) -> int:
        """Tokens of ours that others find, or never will."""
        return max(self._chain.index * self._pool.block_size, self._parts.last_end(self._reached))

    # Growth

    def reserve(self, num_tokens: int) -> bool:
        """Grow to cover `num_tokens` positions; False and no change if the pool has too few blocks for us."""
        missing = -(-num_tokens // self._pool.block_size) - len(self.block_ids)
        if missing > 0:
            blocks = self._pool.allocate(missing, self._regions[-1].root, alone=self.is_alone)
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
        blocks = pool.allocate(len(shared), self._regions[-1].root, alone=self.is_alone)
        if blocks is None:
            return False
        for index, block in zip(shared, blocks, strict=True):
            source = BlockId(self.block_ids[index])
            self.block_ids[index] = block
            if start > index * size:
                self._copies.order(source, block, start - index * size)
            else:
                pool.release((source,))
        return True

    def fork(self, num_computed: int) -> BlockTable:
        """A table of a sequence that has the first `num_computed` positions in common with ours; seal first.

        It holds the same blocks, the last partial one too: who writes to that first, copies it.
        """
        if self._copies.sources or num_computed < self._chain.index * self._pool.block_size:
            raise BrokenInvariant("a table is forked behind what is sealed, and with no copies to be done")
        twin = BlockTable(self._pool, self._regions, no_store=self._no_store)
        shared = self.block_ids[: -(-num_computed // self._pool.block_size)]
        self._pool.acquire([BlockId(block) for block in shared if block != NO_BLOCK])
        self._pool.acquire([block for _, block in self._stand_ins])
        twin._hold(shared)
        twin._chain = self._chain.copy()
        twin._sealing, twin._tip, twin._hole_end = self._sealing, self._tip, self._hole_end
        twin._stand_ins, twin._reached = list(self._stand_ins), num_computed
        return twin

    def share_end(self, token_ids: array[int], start: int, end: int) -> int:
        """Where to stop computing [start, end) for a moment: at a published end inside a block that nobody holds, so
        that `seal` finds the block with nothing behind it; else `end`."""
        size, first = self._pool.block_size, self._chain.index * self._pool.block_size
        for one in self._parts.ends if self._sealing else ():
            if start < one.position < end:
                tokens = token_bytes(token_ids[first : one.position]) if one.position < first + size else b""
                if not tokens or self._parts.holder(one, self._pool.number(self._tip), tokens) is None:
                    return one.position
        return end

    def seal(self, token_ids: array[int], num_computed: int) -> bool:
        """Make findable what became full, and the block in which a published head ends if we stopped there.

        `token_ids` are the sequence's, `num_computed` of them are in KV. True: our last block is now for others to copy
        from, and `prepare_write` comes before the next write.
        """
        full, before = num_computed // self._pool.block_size, self._reached
        self._reached = num_computed
        if not self._sealing or (self._chain.index >= full and self._parts.last_end(num_computed) <= before):
            return False
        if num_computed > len(token_ids) or full > len(self.block_ids):
            raise BrokenInvariant("more positions are sealed than the sequence has")
        for index in range(self._chain.index, full):
            if not self._seal_block(index, token_ids):
                self._sealing = False  # nothing behind this block could be found
                break
        is_end = self._sealing and self._seal_end(token_ids, num_computed)
        if self._flight is not None:
            self._lead()
        return is_end

    def _seal_end(self, token_ids: array[int], num_computed: int) -> bool:
        """Leave our last block to others, if a published head ends with it, nobody has that yet, and there is another
        block for us to go on in."""
        pool, chain = self._pool, self._chain
        end = next((end for end in self._parts.ends if end.position == num_computed), None)
        if end is None or not pool.num_available or (self._tip != NO_BLOCK and not pool.is_sealed(self._tip)):
            return False
        block, number = BlockId(self.block_ids[chain.index]), pool.number(self._tip)
        tokens = token_bytes(token_ids[chain.index * pool.block_size : num_computed])
        if not pool.is_writable(block) or self._parts.holder(end, number, tokens) is not None:
            return False
        return pool.seal_end(block, Content(chain.end_key(end.root, tokens), end.root, number, tokens))

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
        return self._copies.take()

    def copies_done(self) -> None:
        """The copies taken so far were carried out."""
        self._copies.done()

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
        self._end_flight()
        if self.block_ids:
            self._pool.num_holders -= 1
        self._pool.release([*self._copies.sources, *self._backwards(0, len(self.block_ids))])
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
    def is_alone(self) -> bool:
        """Whether no other sequence holds blocks."""
        return self._pool.num_holders == bool(self.block_ids)
