"""Block keys: a chain of XXH3-128 digests over the token ids of full blocks, started from a scope root.

Knows nothing of pools or workers; routers and workers share this one file. Invariant: equal regions, tokens and block
size give equal keys in every process whose key fingerprint is equal. xxHash is no security boundary: whoever finds a
block by its key still compares scope, parent and tokens.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, cast

from xxhash import xxh3_128_digest

from kvstore.block import BlockKey
from kvstore.scope import KEY_VERSION, Region, ScopeRoot, check_regions, frame

KEY_BITS = 128
TOKEN_BYTES = 4


class Span(NamedTuple):
    """The full blocks of one region: up to block index `end`, exclusive; None for the open last one."""

    end: int | None
    root: ScopeRoot
    seed: int
    is_last: bool


def spans(regions: Sequence[Region], block_size: int) -> list[Span]:
    """The regions in whole blocks, borders rounded down; a region without a full block of its own has no span."""
    check_regions(regions)
    found: list[Span] = []
    before = 0
    for region in regions:
        end = None if region.end is None else region.end // block_size
        if end is None or end > before:
            found.append(Span(end, region.root, _seed(region.root), end is None))
            before = end or 0
    return found


def block_keys(
    regions: Sequence[Region], token_ids: array[int], block_size: int, *, key_bits: int = KEY_BITS
) -> list[BlockKey]:
    """The key of every full block of `token_ids` (an array 'I'), in order.

    `key_bits` below 128 makes collisions likely; it is for tests of what happens then.
    """
    cut = _cutter(key_bits)
    # The loop of every request's way: each block's bytes from one C iterator, each key kept by the list itself.
    blocks = struct.iter_unpack(f"{block_size * TOKEN_BYTES}s", _whole(token_bytes(token_ids), block_size))
    num_blocks = len(token_ids) // block_size
    keys: list[BlockKey] = []
    key = b""
    for end, root, seed, _ in spans(regions, block_size):
        first = len(keys)
        if first >= num_blocks:
            break
        of_span = blocks if end is None else islice(blocks, end - first)
        key = _enter(key, root, seed)
        if cut is None:
            made = [key := xxh3_128_digest(key + block, seed) for (block,) in of_span]
        else:
            made = [key := cut(xxh3_128_digest(key + block, seed)) for (block,) in of_span]
        keys += cast("list[BlockKey]", made)
    return keys


class KeyChain:
    """A cursor over the keys of one sequence: `peek` the next block's key, `advance` once that block is accepted."""

    __slots__ = ("_cut", "_last", "_parent", "_position", "_spans", "index")

    def __init__(self, regions: Sequence[Region], block_size: int, *, key_bits: int = KEY_BITS) -> None:
        self._spans = spans(regions, block_size)
        self._cut = _cutter(key_bits)
        self.restart()

    def copy(self) -> KeyChain:
        """A second cursor at the same place."""
        twin = KeyChain.__new__(KeyChain)
        twin._spans, twin._cut = self._spans, self._cut
        twin.index, twin._position = self.index, self._position
        twin._last, twin._parent = self._last, self._parent
        return twin

    def restart(self) -> None:
        """Go back to the first block."""
        self.index = 0
        self._position = 0
        self._last = b""
        self._parent = _enter(b"", self._spans[0].root, self._spans[0].seed)

    @property
    def root(self) -> ScopeRoot:
        """The scope of the next block."""
        return self._spans[self._position].root

    @property
    def in_last_region(self) -> bool:
        """Whether the next block belongs to the last region."""
        return self._spans[self._position].is_last

    def peek(self, block_tokens: bytes) -> BlockKey:
        """The key of the next block, were these its token ids (little-endian u32)."""
        key = xxh3_128_digest(self._parent + block_tokens, self._spans[self._position].seed)
        return BlockKey(key if self._cut is None else self._cut(key))

    def end_key(self, root: ScopeRoot, tokens: bytes) -> BlockKey:
        """The key of what the scope `root` has of the next block, ending with these tokens: fewer than a block."""
        seed = _seed(root)
        key = xxh3_128_digest(_enter(self._last, root, seed) + tokens, seed)
        return BlockKey(key if self._cut is None else self._cut(key))

    def advance(self, key: BlockKey) -> None:
        """Take `key`, as `peek` gave it, for the next block and go behind it."""
        self.index += 1
        self._last = self._parent = key
        if self.index == self._spans[self._position].end:
            self._position += 1
            self._parent = _enter(key, self.root, self._spans[self._position].seed)


def key_fingerprint(model_fingerprint: bytes, block_size: int) -> str:
    """Hex digest that two processes share exactly if they make the same keys from the same roots and tokens."""
    message = frame("keys", KEY_VERSION.to_bytes(8, "little"), model_fingerprint, block_size.to_bytes(8, "little"))
    return hashlib.blake2b(message, digest_size=16, person=b"pando.keys").hexdigest()


def token_bytes(token_ids: array[int]) -> bytes:
    """Token ids as little-endian u32."""
    if token_ids.typecode != "I" or token_ids.itemsize != TOKEN_BYTES:
        raise ValueError("token ids must be an array of type 'I'")
    return token_ids.tobytes()


def _seed(root: ScopeRoot) -> int:
    return int.from_bytes(root[:8], "little")


def _whole(data: bytes, block_size: int) -> memoryview:
    """The bytes of the full blocks."""
    step = block_size * TOKEN_BYTES
    return memoryview(data)[: len(data) // step * step]


def _enter(parent: bytes, root: ScopeRoot, seed: int) -> bytes:
    """The parent of a region's first block: the root itself at the start, else a digest that binds both."""
    return xxh3_128_digest(parent + root, seed) if parent else root


class _Cut:
    """Keeps the low `bits` of a digest and zeroes the rest."""

    __slots__ = ("_mask",)

    def __init__(self, bits: int) -> None:
        self._mask = (1 << bits) - 1

    def __call__(self, digest: bytes) -> bytes:
        return (int.from_bytes(digest, "little") & self._mask).to_bytes(len(digest), "little")


def _cutter(key_bits: int) -> _Cut | None:
    if not 1 <= key_bits <= KEY_BITS:
        raise ValueError("key_bits must be from 1 to 128")
    return None if key_bits == KEY_BITS else _Cut(key_bits)
