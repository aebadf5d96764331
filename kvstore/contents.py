"""What the sealed blocks of one tier hold: key, scope, tokens, parent, and the children below.

Knows nothing of references or eviction. Invariant: a content number names one run of tokens in one scope behind one
parent for ever; two blocks share it only in different tiers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple

from kvstore.block import NO_CONTENT, BlockId, BlockKey, BrokenInvariant
from kvstore.children import Children
from kvstore.scope import ScopeRoot

ROOT_BYTES = 16


class Content(NamedTuple):
    """What a sealed block holds: `tokens` (little-endian u32) in the scope `root`, behind the content `parent`."""

    key: BlockKey
    root: ScopeRoot
    parent: int
    tokens: bytes


class Contents:
    """The records of `num_blocks` blocks. `numbers` gives new content numbers; the tiers of a worker share it."""

    __slots__ = (
        "_numbers",
        "by_key",
        "children",
        "collisions",
        "ends",
        "keys",
        "numbers",
        "parents",
        "roots",
        "tokens",
        "uncopied",
    )

    def __init__(self, num_blocks: int, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self.collisions = 0
        self.by_key: dict[BlockKey, BlockId] = {}
        self.ends: set[int] = set()
        """Those of the blocks that hold fewer tokens than a block has: a published head ends there."""
        self.keys: list[BlockKey | None] = [None] * num_blocks
        self.tokens: list[bytes] = [b""] * num_blocks
        self.roots: list[ScopeRoot | None] = [None] * num_blocks
        self.numbers = array("Q", bytes(8 * num_blocks))
        self.parents = array("Q", bytes(8 * num_blocks))
        self.children = Children(self._label)
        self.uncopied: dict[int, BlockId] | None = None
        """With another tier behind this one: blocks it has not been offered, by content number, the oldest first."""

    def find(self, key: BlockKey, root: ScopeRoot, parent: int, tokens: bytes) -> BlockId | None:
        """The block of exactly this scope, parent content and tokens; another one under its key is a collision."""
        block = self.by_key.get(key)
        if block is None:
            return None
        if self.tokens[block] == tokens and self.roots[block] == root and self.parents[block] == parent:
            return block
        self.collisions += 1
        return None

    def record(self, block: BlockId, content: Content, number: int = NO_CONTENT) -> None:
        """Enter a block under a key that is not taken, with the content's `number` or a new one."""
        key, root, parent, tokens = content
        self.by_key[key] = block
        self.keys[block] = key
        self.tokens[block] = tokens
        self.roots[block] = root
        self.parents[block] = parent
        self.numbers[block] = number or next(self._numbers)
        self.children.add(parent, block)
        if self.uncopied is not None and not number:
            self.uncopied[self.numbers[block]] = block

    def of(self, block: BlockId) -> Content:
        """What a sealed block holds."""
        key, root = self.keys[block], self.roots[block]
        if key is None or root is None:
            raise BrokenInvariant(f"block {block} is not sealed")
        return Content(key, root, self.parents[block], self.tokens[block])

    def erase(self, block: BlockId) -> BlockKey:
        """Forget what a sealed block holds; its key."""
        key = self.keys[block]
        if key is None:
            raise BrokenInvariant(f"block {block} is not sealed")
        self.children.remove(self.parents[block], block)
        del self.by_key[key]
        if self.uncopied is not None:
            self.uncopied.pop(self.numbers[block], None)
        self.ends.discard(block)
        self.keys[block] = None
        self.tokens[block] = b""
        self.roots[block] = None
        self.numbers[block] = NO_CONTENT
        self.parents[block] = NO_CONTENT
        return key

    def holds(self, key: BlockKey, number: int) -> bool:
        """Whether this very content is here."""
        block = self.by_key.get(key)
        return block is not None and self.numbers[block] == number

    def closest(self, root: ScopeRoot, parent: int, tokens: bytes) -> tuple[BlockId, int] | None:
        """(block, bytes in common) of the child in this scope that shares the longest run of bytes with `tokens`."""
        found = self.children.closest(parent, root + tokens)
        if found is None or found[1] <= ROOT_BYTES:
            return None
        return BlockId(found[0]), found[1] - ROOT_BYTES

    def below(self, blocks: list[int]) -> list[int]:
        """These blocks and all that descend from them in this tier, each once, parents before children."""
        found: dict[int, None] = {}
        todo = blocks[::-1]
        while todo:
            block = todo.pop()
            if block in found:
                continue
            found[block] = None
            todo += self.children.of(self.numbers[block])
        return list(found)

    def check(self, *, closed: bool) -> None:
        """Raise BrokenInvariant if the records contradict each other; `closed`: every parent is in this tier."""
        sealed = [block for block, key in enumerate(self.keys) if key is not None]
        if len(sealed) != len(self.by_key):
            raise BrokenInvariant("the key map has lost a block")
        numbers = {self.numbers[block] for block in sealed}
        if len(numbers) != len(sealed) or NO_CONTENT in numbers:
            raise BrokenInvariant("two sealed blocks have one content number")
        children = {parent: set(self.children.of(parent)) for parent in {self.parents[block] for block in sealed}}
        for key, block in self.by_key.items():
            if self.keys[block] != key:
                raise BrokenInvariant("the key map names the wrong block")
            if block not in children[self.parents[block]]:
                raise BrokenInvariant("a sealed block is missing below its parent")
            if closed and self.parents[block] != NO_CONTENT and self.parents[block] not in numbers:
                raise BrokenInvariant("a sealed block outlived its parent")

    def _label(self, block: int) -> bytes:
        root = self.roots[block]
        assert root is not None
        return root + self.tokens[block]
