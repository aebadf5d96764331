"""The fixed pool of KV blocks of one tier: references, sealed content, eviction and charges.

Knows nothing of tensors or sequences. Invariant: a block is found only by its own scope, parent content and token ids,
whatever its key says, and on a device what is sealed is closed under parents.

    free (no content) --allocate--> referenced --seal--> referenced and sealed
          ^                             |  ^                    |   ^
          +----------- release ---------+  |                 release | acquire
          +---------------- evict ---------+------ cached <-----+   |
                                                     +--------------+
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count as counting

from kvstore import audit
from kvstore.block import NO_BLOCK, NO_CONTENT, BlockId, BlockKey, BrokenInvariant, Purged
from kvstore.block_key import KEY_BITS, TOKEN_BYTES
from kvstore.changes import Changes
from kvstore.contents import Content, Contents
from kvstore.events import DEVICE, Event
from kvstore.eviction import SLRU, EvictionOrder
from kvstore.flights import Flights
from kvstore.quota import Ledger, Owner, Quota
from kvstore.scope import ScopeRoot


class BlockPool:
    """`num_blocks` blocks of `block_size` token positions each. For one thread.

    `reuse=False` seals nothing and finds nothing. `policy`: see `EvictionOrder`. `wipe=True` collects every block that
    becomes free, for the owner of the memory to overwrite. `numbers` is shared by the tiers of a worker. `key_bits`
    below 128 is for tests: it makes keys collide.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        key_bits: int = KEY_BITS,
        reuse: bool = True,
        policy: str = SLRU,
        tier: int = DEVICE,
        wipe: bool = False,
        numbers: Iterator[int] | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a pool needs at least one block of at least one position")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.key_bits = key_bits
        self.reuse = reuse
        self.tier = tier
        self.policy = policy
        self.evictions = 0
        self.numbers = numbers if numbers is not None else counting(1)
        self.contents = Contents(num_blocks, self.numbers)
        """What sealed blocks hold: others only read it."""
        self.flights = Flights()
        self.num_holders = 0
        """Sequences that hold blocks."""
        self.is_only_tier = True
        self.on_forget: Callable[[BlockKey, int], None] | None = None
        """Told of each content, by key and number, that was here and is no more."""
        self.known_elsewhere: Callable[[Content], int] | None = None
        """The number under which another tier holds a content, NO_CONTENT if none does."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = array("i", bytes(4 * num_blocks))
        self._generations = array("Q", bytes(8 * num_blocks))
        self._owners: list[Owner | None] = [None] * num_blocks
        self._ledger = Ledger(num_blocks)
        self._order = EvictionOrder(policy, self.contents, self._references, self._owners)
        self.next_to_evict = self._order.upcoming
        self._num_unreferenced = num_blocks
        self._num_cached = 0
        self._changes = Changes(tier)
        self._wipe = wipe
        self._wipes: list[BlockId] = []

    # Counts

    @property
    def num_free(self) -> int:
        """Blocks without content or holder."""
        return self._num_unreferenced - self._num_cached

    @property
    def num_cached(self) -> int:
        """Sealed blocks that nobody holds: found by their content until they are evicted."""
        return self._num_cached

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give to a lone holder: free and cached ones."""
        return self._num_unreferenced

    @property
    def num_referenced(self) -> int:
        """Blocks that somebody holds."""
        return self._ledger.num_held

    @property
    def num_sealed(self) -> int:
        """Blocks that can be found by their content, held or not."""
        return len(self.contents.by_key)

    # Blocks

    def allocate(self, count: int, root: ScopeRoot | None = None, *, alone: bool = False) -> list[BlockId] | None:
        """`count` empty blocks with one reference each, charged to the owner of `root`; None and no change if there are
        too few, or if others would miss the room of their floors. `alone`: nobody else holds blocks.
        """
        if count > self._num_unreferenced:
            return None
        owner = self._ledger.owner(root)
        if self._ledger.unmet and not alone and not self._ledger.leaves_floors({owner: count}):
            self._ledger.forget_if_empty(owner)
            return None
        self._recharge(owner, count)
        if self._ledger.over:
            self._trim()
        free, references, generations, owners = self._free, self._references, self._generations, self._owners
        while len(free) < count and self._evict_next():
            pass
        if len(free) < count:
            self._recharge(owner, -count)
            return None
        blocks = free[: -count - 1 : -1]
        del free[len(free) - count :]
        for block in blocks:
            references[block] = 1
            generations[block] += 1
            owners[block] = owner
        self._num_unreferenced -= count
        self._ledger.hold(owner, count)
        if self._ledger.over:
            self._trim()
        return blocks  # type: ignore[return-value]

    def has_room(self, wanted: Mapping[ScopeRoot, int], *, alone: bool = False) -> bool:
        """Whether `allocate` could give so many blocks more to each scope's owner; `alone`: nobody else holds any."""
        if alone:
            return sum(wanted.values()) <= self._num_unreferenced
        return self._ledger.leaves_floors({self._ledger.account(root): count for root, count in wanted.items()})

    def may_acquire(self, blocks: Sequence[BlockId]) -> bool:
        """Whether holding these would leave others the room of their floors."""
        return not self._ledger.unmet or self._ledger.leaves_floors(
            Counter(owner for block in blocks if not self._references[block] and (owner := self._owners[block]))
        )

    def acquire(self, blocks: Sequence[BlockId], *, hit: bool = False) -> None:
        """One more reference on each of these blocks, which are held or sealed; `hit`: because they were looked for."""
        references, keys = self._references, self.contents.keys
        for block in blocks:
            if not 0 <= block < self.num_blocks or (references[block] == 0 and keys[block] is None):
                raise BrokenInvariant(f"block {block} is free and cannot be acquired")
        for block in blocks:
            if references[block] == 0:
                self._order.remove(block)
                self._num_unreferenced -= 1
                self._num_cached -= 1
                self._ledger.hold(self._owner(block), 1)
            references[block] += 1
            if hit and keys[block] is not None:
                self._order.hit(block)

    def is_writable(self, block: BlockId) -> bool:
        """Whether its one holder may write to it."""
        return self._references[block] == 1 and self.contents.keys[block] is None

    def seal(self, block: BlockId, key: BlockKey, root: ScopeRoot, parent: BlockId, tokens: bytes) -> BlockId | None:
        """Make a full block findable, and return the block that now stands for this content: `block`, or another one
        that had it before; then `block` stays private to its holder. None on a key collision: the resident one stays.
        """
        if parent != NO_BLOCK and self.contents.keys[parent] is None:
            raise BrokenInvariant(f"block {block} cannot be sealed: its parent is not")
        return self.seal_as(block, Content(key, root, self.number(parent), tokens))

    def seal_as(self, block: BlockId, content: Content, number: int = NO_CONTENT) -> BlockId | None:
        """As `seal`, by the parent's content number: it may be in another tier. `number` is the content's own."""
        if len(content.tokens) != TOKEN_BYTES * self.block_size:
            raise BrokenInvariant(f"block {block} cannot be sealed: it is not full")
        resident = self._seal(block, content, number)
        if resident == block:
            self._changes.stored(content.key)
        return resident

    def seal_end(self, block: BlockId, content: Content) -> bool:
        """As `seal`, of a block in which a published head ends: fewer tokens, of which the index is not told and below
        which nothing hangs. False if another block has the key."""
        if self._seal(block, content) != block:
            return False
        self.contents.ends.add(block)
        return True

    def _seal(self, block: BlockId, content: Content, number: int = NO_CONTENT) -> BlockId | None:
        contents = self.contents
        if self._references[block] != 1 or contents.keys[block] is not None:
            raise BrokenInvariant(f"block {block} cannot be sealed: it is free, shared or sealed")
        resident = contents.find(*content)
        if resident is not None:
            return resident
        if not self.reuse or content.key in contents.by_key:
            return None
        if not number and self.known_elsewhere is not None:
            number = self.known_elsewhere(content)
        self._charge_to(block, self._ledger.owner(content.root))
        contents.record(block, content, number)
        self._order.sealed(block)
        self._trim()
        return block

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give back one reference on each; blocks that nobody holds any more are evicted in the order given, about.
        A block that is not held is an error, and then nothing changes."""
        references = self._references
        unheld: list[BlockId] = []
        for done, block in enumerate(blocks):
            if not 0 <= block < self.num_blocks or references[block] == 0:
                for undo in blocks[:done]:
                    references[undo] += 1
                raise BrokenInvariant(f"block {block} is not held and cannot be released")
            references[block] -= 1
            if references[block] == 0:
                unheld.append(block)
        keys, owners, hold, add = self.contents.keys, self._owners, self._ledger.hold, self._order.add
        for block in unheld:
            hold(owners[block], -1)  # type: ignore[arg-type]
            if keys[block] is None:
                self._discharge(block)
            else:
                self._num_cached += 1
                add(block)
        self._num_unreferenced += len(unheld)
        self._trim()

    # Forgetting

    def clear(self) -> None:
        """Forget the content of every block that nobody holds."""
        while self._num_cached and self._evict_next():
            pass
        if not self.contents.by_key and self.is_only_tier:
            self._changes.cleared()

    def drop(self, blocks: Sequence[int]) -> Purged:
        """Forget these sealed blocks and all below them; those in use stay with their holders, found by nobody."""
        gone = self.contents.below(list(blocks))
        held = sum(self._references[block] > 0 for block in gone)
        for block in reversed(gone):
            self._order.erase(block)
            (self._forget if self._references[block] else self._evict)(block)
        self._trim()
        return Purged(len(gone) - held, held)

    def purge(self, root: ScopeRoot) -> Purged:
        """Forget every sealed block that the owner of `root` is charged for, and what hangs below."""
        owner = self._ledger.account(root)
        sealed = [block for block in self.contents.by_key.values() if self._owners[block] is owner]
        return self.drop(sealed)

    def begin_transfer(self, block: BlockId) -> None:
        """A sealed block is being read by a copy: it is evicted only if nothing else is left."""
        self._order.begin_transfer(block)

    def end_transfer(self, block: BlockId) -> None:
        """The copy has ended, one way or the other."""
        self._order.end_transfer(block)
        self._trim()

    # Charges

    def set_quota(self, root: ScopeRoot, quota: Quota | None) -> None:
        """Set or drop the quota of the owner of `root`; ValueError if the floors no longer fit the pool. A scan."""
        owner = self._ledger.set_quota(root, quota)
        self._order.enlist(owner)
        self._recharge(owner, 0)
        self._trim()

    def set_publisher(self, root: ScopeRoot, publisher: ScopeRoot) -> None:
        """Charge what is sealed in the scope `root` from now on to `publisher`."""
        self._ledger.set_publisher(root, publisher)

    def account(self, root: ScopeRoot) -> Owner:
        """The account that pays for the scope `root`: to be read."""
        return self._ledger.account(root)

    def _charge_to(self, block: BlockId, owner: Owner) -> None:
        """Move a held block to another account."""
        before = self._owner(block)
        if before is owner:
            return
        for account, change in ((before, -1), (owner, 1)):
            self._ledger.hold(account, change)
            self._recharge(account, change)
        self._owners[block] = owner

    def _recharge(self, owner: Owner, change: int) -> None:
        """Change the owner's charge, and see what follows."""
        self._ledger.recharge(owner, change)
        if owner.sheltered:
            self._order.refresh(owner)

    def _trim(self) -> None:
        """Take from owners over their ceiling what they do not use."""
        for owner in list(self._ledger.over):
            while owner.excess:
                block = self._order.take_of(owner)
                if block is None:
                    break
                self._evict(block)
            else:
                del self._ledger.over[owner]

    def _owner(self, block: int) -> Owner:
        owner = self._owners[block]
        assert owner is not None
        return owner

    # Content

    def number(self, block: BlockId) -> int:
        """The number of a sealed block's content; NO_CONTENT for NO_BLOCK and blocks that are not sealed."""
        return NO_CONTENT if block == NO_BLOCK else self.contents.numbers[block]

    def generation(self, block: BlockId) -> int:
        """Grows each time the block gets a new holder of its own or loses its content."""
        return self._generations[block]

    def references(self, block: BlockId) -> int:
        """How many hold the block."""
        return self._references[block]

    def is_sealed(self, block: BlockId) -> bool:
        """Whether the block is found by its content."""
        return self.contents.keys[block] is not None

    def sealed_keys(self) -> list[BlockKey]:
        """The keys of all full sealed blocks: what the index knows."""
        ends = self.contents.ends
        return [key for key, block in self.contents.by_key.items() if block not in ends]

    def take_events(self) -> list[Event]:
        """The net change of the sealed set since the last call: at most one event of each kind."""
        return self._changes.take()

    def take_wipes(self) -> list[BlockId]:
        """Blocks that became free since the last call and were not wiped since; some may be in use again."""
        wipes, self._wipes = self._wipes, []
        return wipes

    def _evict_next(self) -> bool:
        """Free the next block; on a device there is one, as whoever holds a block holds its parents."""
        block = self._order.take()
        if block is not None:
            self._evict(block)
        elif self.tier == DEVICE:
            raise BrokenInvariant("there is no block to evict")
        return block is not None

    def _evict(self, block: int) -> None:
        """Free a cached block that was just taken out of the order."""
        self._forget(block)
        self._num_cached -= 1
        self.evictions += 1
        self._discharge(block)

    def _forget(self, block: int) -> None:
        """A sealed block's content can no longer be found."""
        contents = self.contents
        number, parent = contents.numbers[block], contents.parents[block]
        is_end = block in contents.ends
        key = contents.erase(BlockId(block))
        self._generations[block] += 1
        if not is_end:
            self._changes.removed(key)
        self._order.forgotten(block, parent)
        if self.on_forget is not None:
            self.on_forget(key, number)

    def _discharge(self, block: int) -> None:
        """A block becomes free."""
        self._recharge(self._owner(block), -1)
        self._owners[block] = None
        self._free.append(block)
        if self._wipe:
            self._wipes.append(BlockId(block))

    def check(self, *, deep: bool = False) -> None:
        """Raise BrokenInvariant if the pool contradicts itself. The short form costs a scan of the counts in C."""
        audit.check_counts(self)
        if deep:
            audit.check_blocks(self)
