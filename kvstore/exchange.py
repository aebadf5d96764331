"""Blocks that go to another worker or come from one, always through the CPU tier of both.

Knows tokens, scopes and tiers, no network and no bytes. Invariants: what leaves was found by its exact scope, parent
and tokens and is held until it is read; what arrives can be found only once it is whole, and behind its own parent.
Nothing that was on its way when somebody's blocks were purged leaves or arrives after that.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvstore.block import NO_CONTENT, BlockId, BlockKey
from kvstore.block_key import TOKEN_BYTES, KeyChain, token_bytes
from kvstore.contents import Content
from kvstore.scope import Region
from kvstore.tiers import Tiers


@dataclass(slots=True)
class Export:
    """Up to `most` full blocks of a prompt on their way out, from block `first` on. `rows` are CPU blocks, in order,
    that can be read now."""

    regions: Sequence[Region]
    token_ids: array[int]
    first: int
    most: int
    rows: list[BlockId] = field(default_factory=list)
    contents: list[tuple[Content, int]] = field(default_factory=list)
    """What is still to come, in order, with its content number."""
    num_found: int = 0
    era: int = 0
    """How many purges there had been when it began."""

    @property
    def ready(self) -> bool:
        """Whether nothing more will come."""
        return not self.contents


@dataclass(slots=True)
class Import:
    """The first `most` full blocks of a prompt, on their way in from block `first` on. `rows` are CPU blocks to be
    written, in order."""

    regions: Sequence[Region]
    token_ids: array[int]
    most: int
    first: int = 0
    rows: list[BlockId] = field(default_factory=list)
    contents: list[Content] = field(default_factory=list)
    """Without the parent, which is known when it has arrived."""
    parent: tuple[BlockKey | None, int] = (None, NO_CONTENT)
    """Key and number of what the next one hangs below."""
    num_arrived: int = 0
    era: int = 0
    """As an export's."""


class Exchange:
    """Both directions, for one worker's tiers and the thread that owns them. What was begun must be ended; ending what
    was not begun, or ended before, does nothing."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    # Out

    def begin_export(self, export: Export) -> None:
        """Hold what of it is in the CPU tier, and order copies of what else is here."""
        export.era = self._tiers.num_purges
        resident = self._resident(export.regions, export.token_ids)
        export.contents = resident[export.first : export.first + export.most]
        export.num_found = len(export.contents)
        self.advance(export)

    def advance(self, export: Export) -> None:
        """Take hold of what has come to the CPU tier; order copies of what has not. What was lost ends the export."""
        if self.is_void(export):
            export.contents.clear()
        while export.contents:
            content, number = export.contents[0]
            row = self._tiers.cpu.contents.find(*content)
            if row is None:
                break
            self._tiers.cpu.acquire((row,))
            export.rows.append(row)
            del export.contents[0]
        for at, (content, number) in enumerate(export.contents):
            in_cpu = self._tiers.cpu.contents.holds(content.key, number)
            if not in_cpu and not self._tiers.copy(content, number):
                del export.contents[at:]
                return

    def end_export(self, export: Export) -> None:
        """All that was held is read, or nobody wants it."""
        export.contents.clear()
        self._tiers.cpu.release(export.rows)
        export.rows = []

    # In

    def begin_import(self, arriving: Import) -> None:
        """Make room for what comes behind what is here; no rows if there is none, or no need."""
        arriving.era = self._tiers.num_purges
        here = self._resident(arriving.regions, arriving.token_ids)
        chain = self._chain(arriving.regions)
        for content, _ in here:
            chain.advance(content.key)
        if here:
            arriving.parent = here[-1][0].key, here[-1][1]
        arriving.first = len(here)
        for tokens in _blocks(arriving.token_ids, self._size)[len(here) : arriving.most]:
            rows = self._tiers.make_room(chain.root)
            if rows is None:
                break
            key = chain.peek(tokens)
            arriving.rows += rows
            arriving.contents.append(Content(key, chain.root, NO_CONTENT, tokens))
            chain.advance(key)

    def arrived(self, arriving: Import, count: int) -> bool:
        """The next `count` rows are written; whether those behind them still have a place to go."""
        if self.is_void(arriving):
            return False
        for _ in range(count):
            at = arriving.num_arrived
            parent_key, parent = arriving.parent
            content = arriving.contents[at]._replace(parent=parent)
            number = self._tiers.take_in(arriving.rows[at], content, parent_key)
            if not number:
                return False
            arriving.parent = content.key, number
            arriving.num_arrived += 1
        return True

    def end_import(self, arriving: Import) -> None:
        """Nothing more comes: rows that were not written are free again."""
        self._tiers.cpu.release(arriving.rows)
        arriving.rows = []

    # Both

    def is_void(self, moving: Export | Import) -> bool:
        """Whether blocks were purged since it began. From any thread."""
        return moving.era != self._tiers.num_purges

    @property
    def _size(self) -> int:
        return self._tiers.device.block_size

    def _chain(self, regions: Sequence[Region]) -> KeyChain:
        return KeyChain(regions, self._size, key_bits=self._tiers.device.key_bits)

    def _resident(self, regions: Sequence[Region], token_ids: array[int]) -> list[tuple[Content, int]]:
        """What either tier holds of a prompt, from its start, with content numbers."""
        chain, parent = self._chain(regions), NO_CONTENT
        found: list[tuple[Content, int]] = []
        for tokens in _blocks(token_ids, self._size) if self._tiers.device.reuse else ():
            content = Content(chain.peek(tokens), chain.root, parent, tokens)
            parent = self._tiers.number_of(content)
            if not parent:
                break
            found.append((content, parent))
            chain.advance(content.key)
        return found


def _blocks(token_ids: array[int], block_size: int) -> list[bytes]:
    """The token ids of each full block."""
    data, step = token_bytes(token_ids), block_size * TOKEN_BYTES
    return [data[at : at + step] for at in range(0, len(data) - step + 1, step)]
