"""The fixed pool of KV blocks of one tier: reference counts, sealed content by key, free blocks in eviction order.

Knows nothing of tensors or sequences. Invariant: what is sealed is closed under parents, and a block is found only by
its own scope, parent and token ids, whatever its key says.

    free (no content) --allocate--> referenced --seal--> referenced and sealed
          ^                             |  ^                    |   ^
          +----------- release ---------+  |                 release | acquire
          +---------------- evict ---------+------ cached <-----+   |
                                                     +--------------+
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvstore.block import NO_BLOCK, BlockId, BlockKey, BrokenInvariant
from kvstore.block_key import KEY_BITS
from kvstore.events import BlocksRemoved, BlocksStored, Cleared, Event
from kvstore.free_queue import FreeQueue
from kvstore.scope import ScopeRoot


class BlockPool:
    """`num_blocks` blocks of `block_size` token positions each. For one thread.

    `reuse=False` seals nothing and finds nothing. `key_bits` below 128 is for tests: it makes keys collide.
    """

    def __init__(self, num_blocks: int, block_size: int, *, key_bits: int = KEY_BITS, reuse: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError("a pool needs at least one block of at least one position")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.key_bits = key_bits
        self.reuse = reuse
        self.key_collisions = 0
        self.evictions = 0
        self._queue = FreeQueue(num_blocks)
        self._references = array("i", bytes(4 * num_blocks))
        self._generations = array("Q", bytes(8 * num_blocks))
        self._sealed_by_key: dict[BlockKey, BlockId] = {}
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._tokens: list[bytes] = [b""] * num_blocks
        self._roots: list[ScopeRoot | None] = [None] * num_blocks
        self._parents = array("i", bytes(4 * num_blocks))
        self._parent_generations = array("Q", bytes(8 * num_blocks))
        self._num_unreferenced = num_blocks
        self._num_cached = 0
        self._changes = _Changes()

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
        """Blocks that `allocate` can give: free and cached ones."""
        return self._num_unreferenced

    @property
    def num_referenced(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self._num_unreferenced

    @property
    def num_sealed(self) -> int:
        """Blocks that can be found by their content, held or not."""
        return len(self._sealed_by_key)

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` empty blocks with one reference each, evicting in order; None and no change if there are too few."""
        if count > self._num_unreferenced:
            return None
        references, generations, keys = self._references, self._generations, self._keys
        blocks = self._queue.pop_front(count)
        for block in blocks:
            if keys[block] is not None:
                self._evict(BlockId(block))
            references[block] = 1
            generations[block] += 1
        self._num_unreferenced -= len(blocks)
        return blocks  # type: ignore[return-value]

    def find(self, key: BlockKey, root: ScopeRoot, parent: BlockId, tokens: bytes) -> BlockId | None:
        """The sealed block of exactly this scope, parent and token ids (little-endian u32), or None.

        `parent` is NO_BLOCK or a block found or sealed just before. A block that has the key and differs in anything
        else is a miss and counts as a key collision.
        """
        block = self._sealed_by_key.get(key)
        if block is None:
            return None
        if self._holds(block, root, parent, tokens):
            return block
        self.key_collisions += 1
        return None

    def acquire(self, blocks: Sequence[BlockId]) -> None:
        """One more reference on each of these blocks, which are held or sealed."""
        references, keys = self._references, self._keys
        for block in blocks:
            if not 0 <= block < self.num_blocks or (references[block] == 0 and keys[block] is None):
                raise BrokenInvariant(f"block {block} is free and cannot be acquired")
        for block in blocks:
            if references[block] == 0:
                self._queue.remove(block)
                self._num_unreferenced -= 1
                self._num_cached -= 1
            references[block] += 1

    def seal(self, block: BlockId, key: BlockKey, root: ScopeRoot, parent: BlockId, tokens: bytes) -> BlockId | None:
        """Make a full block findable, and return the block that now stands for this content.

        That is `block` itself, or another one that was sealed with the same scope, parent and tokens before; then
        `block` stays private to its holder. None on a key collision: the resident block keeps the key.
        """
        self._check_sealable(block, parent, tokens)
        resident = self.find(key, root, parent, tokens)
        if resident is not None:
            return resident
        if not self.reuse or key in self._sealed_by_key:
            return None
        self._sealed_by_key[key] = block
        self._keys[block] = key
        self._tokens[block] = tokens
        self._roots[block] = root
        self._parents[block] = parent
        self._parent_generations[block] = 0 if parent == NO_BLOCK else self._generations[parent]
        self._changes.stored(key)
        return block

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Give back one reference on each; blocks that nobody holds any more are evicted in the order given.

        Children come before their parents. A block that is not held is an error, and then nothing changes.
        """
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
        queue, keys = self._queue, self._keys
        for block in unheld:
            if keys[block] is None:
                queue.push_front(block)
            else:
                self._num_cached += 1
                queue.push_back(block)
        self._num_unreferenced += len(unheld)

    def clear(self) -> None:
        """Forget the content of every block that nobody holds."""
        for block in list(self._queue):
            if self._keys[block] is not None:
                self._evict(BlockId(block))
                self._generations[block] += 1
        if not self._sealed_by_key:
            self._changes.cleared()

    def generation(self, block: BlockId) -> int:
        """Grows each time the block gets a new holder of its own or loses its content."""
        return self._generations[block]

    def references(self, block: BlockId) -> int:
        """How many hold the block."""
        return self._references[block]

    def is_sealed(self, block: BlockId) -> bool:
        """Whether the block is found by its content."""
        return self._keys[block] is not None

    def sealed_keys(self) -> list[BlockKey]:
        """The keys of all sealed blocks."""
        return list(self._sealed_by_key)

    def take_events(self) -> list[Event]:
        """The net change of the sealed set since the last call: at most one event of each kind."""
        return self._changes.take()

    def _evict(self, block: BlockId) -> None:
        """Forget the content of a cached block that stands in the queue or was just taken from it."""
        key = self._keys[block]
        assert key is not None
        del self._sealed_by_key[key]
        self._keys[block] = None
        self._tokens[block] = b""
        self._roots[block] = None
        self._num_cached -= 1
        self.evictions += 1
        self._changes.removed(key)

    def _holds(self, block: BlockId, root: ScopeRoot, parent: BlockId, tokens: bytes) -> bool:
        return (
            self._tokens[block] == tokens
            and self._roots[block] == root
            and self._parents[block] == parent
            and (parent == NO_BLOCK or self._parent_generations[block] == self._generations[parent])
        )

    def _check_sealable(self, block: BlockId, parent: BlockId, tokens: bytes) -> None:
        if self._references[block] != 1 or self._keys[block] is not None:
            raise BrokenInvariant(f"block {block} cannot be sealed: it is free, shared or sealed")
        if parent != NO_BLOCK and self._keys[parent] is None:
            raise BrokenInvariant(f"block {block} cannot be sealed: its parent is not")
        if len(tokens) != 4 * self.block_size:
            raise BrokenInvariant(f"block {block} cannot be sealed: it is not full")

    def check(self, *, deep: bool = False) -> None:
        """Raise BrokenInvariant if the pool contradicts itself. The short form costs a scan of the counts in C."""
        held = self.num_blocks - self._references.count(0)
        if held != self.num_referenced:
            raise BrokenInvariant("the count of referenced blocks is wrong")
        if not 0 <= self._num_cached <= min(self._num_unreferenced, len(self._sealed_by_key)):
            raise BrokenInvariant("the count of cached blocks is wrong")
        if deep:
            self._check_queue()
            self._check_sealed()

    def _check_queue(self) -> None:
        queued = list(self._queue)
        if len(queued) != self._num_unreferenced or len(set(queued)) != len(queued):
            raise BrokenInvariant("the free queue has lost or doubled a block")
        if any(self._references[block] for block in queued):
            raise BrokenInvariant("a held block stands in the free queue")
        if sum(self._keys[block] is not None for block in queued) != self._num_cached:
            raise BrokenInvariant("the count of cached blocks is wrong")

    def _check_sealed(self) -> None:
        sealed = sum(key is not None for key in self._keys)
        if sealed != len(self._sealed_by_key):
            raise BrokenInvariant("the key map has lost a block")
        for key, block in self._sealed_by_key.items():
            parent = BlockId(self._parents[block])
            if self._keys[block] != key:
                raise BrokenInvariant("the key map names the wrong block")
            if parent == NO_BLOCK:
                continue
            if self._keys[parent] is None or self._generations[parent] != self._parent_generations[block]:
                raise BrokenInvariant("a sealed block outlived its parent")


class _Changes:
    """The net change of a set of keys; as large as the set at most, however rarely it is taken."""

    __slots__ = ("_cleared", "_removed", "_stored")

    def __init__(self) -> None:
        self._cleared = False
        self._removed: dict[bytes, None] = {}
        self._stored: dict[bytes, None] = {}

    def stored(self, key: bytes) -> None:
        if key in self._removed:
            del self._removed[key]
        else:
            self._stored[key] = None

    def removed(self, key: bytes) -> None:
        if key in self._stored:
            del self._stored[key]
        else:
            self._removed[key] = None

    def cleared(self) -> None:
        self._cleared = True
        self._removed.clear()
        self._stored.clear()

    def take(self) -> list[Event]:
        events: list[Event] = []
        if self._cleared:
            events.append(Cleared())
        if self._removed:
            events.append(BlocksRemoved(list(self._removed)))
        if self._stored:
            events.append(BlocksStored(list(self._stored)))
        self._cleared = False
        self._removed, self._stored = {}, {}
        return events
