"""Published prefixes as this router knows them, and which of them a tenant's prompt begins with.

Knows no Redis and no worker. Invariant: a look-up for a tenant searches its own prefixes, its groups' and the public
ones; what others publish for themselves can change neither its answer nor its cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from kvstore.scope import TenantId
from router.sorted_prefixes import TOKEN_BYTES, SortedPrefixes
from router.tenants import GROUP, OWN, PUBLIC

Audience = tuple[str, str]
"""Who may use a prefix: (own, tenant), (group, name) or (public, "")."""


class PrefixRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A published prefix. `tokens` are little-endian u32; `audience` is "own", "group" or "public"."""

    id: str
    publisher: str
    audience: str
    group: str
    name: str
    model: str
    tokens: bytes
    copies: int
    warm: bool
    created_ms: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def rank(self) -> tuple[int, str]:
        """Among equal matches the oldest serves: a new publication takes nothing over."""
        return self.created_ms, self.id

    @property
    def readers(self) -> Audience:
        """Who may use it."""
        return self.audience, {OWN: self.publisher, GROUP: self.group}.get(self.audience, "")

    def num_blocks(self, block_size: int) -> int:
        """Full blocks of one copy."""
        return self.num_tokens // block_size

    def num_pinned(self, block_size: int) -> int:
        """Blocks that a pin of one copy holds: for others, the one that it ends in too."""
        ends_inside = self.audience != OWN and self.num_tokens % block_size > 0
        return self.num_blocks(block_size) + ends_inside


@dataclass(frozen=True, slots=True)
class Published:
    """A prefix and when it ends, on the catalog's clock."""

    record: PrefixRecord
    expires_at: float


@dataclass(frozen=True, slots=True)
class Shared:
    """The first `num_tokens` tokens of a prompt are those of a published prefix."""

    record: PrefixRecord
    num_tokens: int


class PrefixCatalog:
    """All live prefixes of the fleet, for one event loop. `on_removed` is told of each that ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.on_removed: Callable[[PrefixRecord], None] = lambda record: None
        self._published: dict[str, Published] = {}
        self._by_reader: dict[Audience, SortedPrefixes[PrefixRecord]] = {}

    def __len__(self) -> int:
        return len(self._published)

    def __iter__(self) -> Iterator[Published]:
        return iter(self._published.values())

    def __contains__(self, prefix_id: str) -> bool:
        return prefix_id in self._published

    def add(self, published: Published) -> None:
        """Know a prefix from now on; nothing happens if it is known."""
        record = published.record
        if record.id not in self._published:
            self._published[record.id] = published
            self._by_reader.setdefault(record.readers, SortedPrefixes()).add(record.tokens, record)

    def remove(self, prefix_id: str) -> None:
        """Forget a prefix. Idempotent."""
        published = self._published.pop(prefix_id, None)
        if published is None:
            return
        record = published.record
        readable = self._by_reader[record.readers]
        readable.remove(record.tokens, record)
        if not readable:
            del self._by_reader[record.readers]
        self.on_removed(record)

    def expire(self) -> None:
        """Forget what has ended."""
        now = self.clock()
        for published in [found for found in self._published.values() if found.expires_at <= now]:
            self.remove(published.record.id)

    def get(self, prefix_id: str, tenant: TenantId, groups: Sequence[str]) -> Published | None:
        """A prefix that the tenant may use; None for any other."""
        published = self._published.get(prefix_id)
        return published if published and published.record.readers in _readable(tenant, groups) else None

    def visible(self, tenant: TenantId, groups: Sequence[str]) -> list[Published]:
        """All that the tenant may use, oldest first."""
        readable = set(_readable(tenant, groups))
        found = (published for published in self if published.record.readers in readable)
        return sorted(found, key=lambda published: published.record.rank)

    def of(self, publisher: TenantId) -> list[PrefixRecord]:
        """All that the tenant published."""
        return [published.record for published in self if published.record.publisher == publisher]

    def longest(self, tenant: TenantId, groups: Sequence[str], tokens: bytes) -> Shared | None:
        """The prefix that shares the most leading tokens with a prompt; of equals the one that more may use."""
        best: Shared | None = None
        for audience in _readable(tenant, groups) if self._by_reader else ():
            readable = self._by_reader.get(audience)
            match = readable.longest(tokens) if readable is not None else None
            if match is not None and (best is None or match.num_tokens > best.num_tokens):
                best = Shared(match.value, match.num_tokens)
        return best


def _readable(tenant: TenantId, groups: Sequence[str]) -> list[Audience]:
    """The audiences that a tenant is in, the widest first."""
    return [(PUBLIC, ""), *((GROUP, group) for group in groups), (OWN, tenant)]
