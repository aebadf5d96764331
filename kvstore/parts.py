"""What of a sequence's next block others hold, and where its published heads end inside one.

Knows the regions of one sequence and the sealed contents of its tier, and holds nothing. Invariant: of another scope
only positions before the end of this sequence's region in it are ever named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstore.block import BlockId
from kvstore.block_key import TOKEN_BYTES
from kvstore.contents import Contents
from kvstore.scope import Region, ScopeRoot


class Part(NamedTuple):
    """The start of a block that another sealed block holds too."""

    source: BlockId
    num_tokens: int
    published: bool


class End(NamedTuple):
    """A position inside a block at which a region ends that others may have too."""

    position: int
    root: ScopeRoot


class Parts:
    """For one sequence. `number` is the content number of the block before; `data` all known tokens, little-endian u32;
    `start` the position at which the block begins."""

    __slots__ = ("_contents", "_size", "ends", "regions")

    def __init__(self, regions: Sequence[Region], contents: Contents, block_size: int) -> None:
        self.regions = tuple(regions)
        self.ends = tuple(End(one.end, one.root) for one in regions if one.end is not None and one.end % block_size)
        """The ends inside blocks, in order."""
        self._contents = contents
        self._size = block_size

    def best(self, number: int, data: bytes, start: int, limit: int) -> Part | None:
        """The longest start of the block in the scopes of the regions that lie in it, each up to its own end.

        Never all of the block: it would be ours, full and not sealed. KV of a position depends on the tokens up to it
        alone, so what the source holds behind the part, in whoever's hands, neither matters nor can be read.
        """
        best: Part | None = None
        for region in self.regions:
            if region.end is not None and region.end <= start:
                continue
            end = min(limit, start + self._size - 1, limit if region.end is None else region.end)
            found = self._contents.closest(region.root, number, data[start * TOKEN_BYTES : end * TOKEN_BYTES])
            length = found[1] // TOKEN_BYTES if found else 0
            if found and length > (best.num_tokens if best else 0):
                best = Part(found[0], length, region.end is not None)
            if region.end is None or region.end >= start + self._size:
                break
        return best

    def holder(self, end: End, number: int, tokens: bytes) -> BlockId | None:
        """The block in the scope of the end that begins with these tokens, all of its block up to it."""
        found = self._contents.closest(end.root, number, tokens)
        return found[0] if found is not None and found[1] == len(tokens) else None

    def open_end(self, number: int, data: bytes, start: int, behind: int) -> End | None:
        """The first end inside the block and behind a position whose tokens are known and that no block holds."""
        for end in self.ends:
            tokens = data[start * TOKEN_BYTES : end.position * TOKEN_BYTES]
            is_here = max(start, behind) < end.position < start + self._size
            is_known = len(tokens) == (end.position - start) * TOKEN_BYTES
            if is_here and is_known and self.holder(end, number, tokens) is None:
                return end
        return None

    def last_end(self, position: int) -> int:
        """The last end that is not behind a position; 0 without one."""
        return max((end.position for end in self.ends if end.position <= position), default=0)

    def shared_with(self, regions: Sequence[Region], num_tokens: int) -> int:
        """Of so many tokens in common with a sequence in `regions`, how many we find when it has computed them: whole
        blocks up to where the regions part, or a published end."""
        limit = min(num_tokens, _parting(self.regions, regions, num_tokens))
        return max(limit // self._size * self._size, self.last_end(limit))


def _parting(one: Sequence[Region], other: Sequence[Region], limit: int) -> int:
    """The position from which on two covers differ in scope, at most `limit`."""
    begin = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine.root != theirs.root:
            return begin
        begin = min(limit if region.end is None else region.end for region in (mine, theirs))
        if mine != theirs:
            return begin
    return limit
