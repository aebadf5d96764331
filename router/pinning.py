"""Keeps published prefixes resident: pins them where they are, computes them again where copies are missing.

Knows the fleet, the catalog and no tenant's text. Invariant: what it does depends on the catalog and the index alone,
so every router of a fleet does the same, and saying it twice changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Awaitable, Callable, Sequence

from xxhash import xxh3_64_intdigest

from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys
from pando.errors import PandoError
from router.fleet import Fleet, FleetModel
from router.link_messages import PinOrder
from router.prefix_catalog import PrefixCatalog, PrefixRecord, Published
from router.scopes import Cover, Scopes
from router.tenants import KvQuota

EVERY_S = 1.0
REPEAT_S = 30.0
PIN_S = 120.0
"""A pin is a lease: nothing stays pinned for long that no router speaks for, or whose publisher lost its record."""

WARM_AGAIN_S = 10.0
WARM_TIMEOUT_S = 60.0
SETTLE_S = 1.0
AT_ONCE = 16
ROUNDS = 30
"""At least so many prefixes are looked at in a round; all of them in at most so many rounds."""

log = logging.getLogger(__name__)

Warm = Callable[[PrefixRecord, WorkerId, KvQuota, float], Awaitable[None]]


class Pinning:
    """For one event loop. `quota_of` says what a publisher may pin; None for one that has no record any more."""

    def __init__(
        self,
        fleet: Fleet,
        catalog: PrefixCatalog,
        scopes: Scopes,
        quota_of: Callable[[str], KvQuota | None],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self.warm: Warm | None = None
        """Computes a prefix on a worker; without it only what is there is pinned."""
        self._fleet = fleet
        self._catalog = catalog
        self._scopes = scopes
        self._quota_of = quota_of
        self._every_s = every_s
        # When a pin was last said, how many blocks were there then; when a copy was last computed.
        self._pinned: dict[tuple[str, WorkerId, int], tuple[float, int]] = {}
        self._warmed_at: dict[str, float] = {}
        self._turn = 0
        self._warming: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look after the catalog's prefixes from now on."""
        self._catalog.on_removed = self._removed
        self._task = asyncio.create_task(self._keep(), name="prefix-pinning")

    async def stop(self) -> None:
        """Stop; pins end by their own time. Idempotent."""
        tasks = [*self._warming, *([self._task] if self._task is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def homes(self, record: PrefixRecord) -> list[WorkerId]:
        """The workers that shall hold a prefix: those that do, then by rendezvous, as many as copies are wanted."""
        model = self._fleet.model_spec
        if model is None:
            return []
        return self._order(record, self._held(record, model))[: record.copies]

    def num_copies(self, record: PrefixRecord) -> int:
        """Ready workers that hold the whole prefix, as far as the index knows."""
        model = self._fleet.model_spec
        if model is None:
            return 0
        wanted = record.num_blocks(model.block_size)
        return sum(held >= wanted for held in self._held(record, model).values())

    def look(self) -> None:
        """One round over the prefixes whose turn it is."""
        for published in self._next():
            self._look_after(published)

    async def settle(self, published: Published, timeout_s: float = SETTLE_S) -> None:
        """After a warm-up: wait a little until the index tells of it, and pin it."""
        ends = self._catalog.clock() + timeout_s
        while not self.num_copies(published.record) and self._catalog.clock() < ends:
            await asyncio.sleep(0.01)
        self._look_after(published)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            for published in self._next():
                self._look_after(published)
                await asyncio.sleep(0)

    def _next(self) -> list[Published]:
        """The next prefixes in turn: few, and all of them in a number of rounds."""
        everything = list(self._catalog)
        count = max(AT_ONCE, -(-len(everything) // ROUNDS))
        first = self._turn if self._turn < len(everything) else 0
        self._turn = first + count
        return everything[first : self._turn]

    def _look_after(self, published: Published) -> None:
        record, model = published.record, self._fleet.model_spec
        if model is None or record.id not in self._catalog:
            return
        held = self._held(record, model)
        wanted = record.num_blocks(model.block_size)
        for worker in self._order(record, held)[: record.copies]:
            if held[worker]:
                self._pin(published, worker, held[worker], model)
            if held[worker] < wanted:
                self._warm_again(record, worker)

    def _pin(self, published: Published, worker: WorkerId, held: int, model: FleetModel) -> None:
        """Say it when it is new, when more is there than was, and now and then."""
        record, now = published.record, self._catalog.clock()
        epoch = self._fleet.epoch_of(worker)
        said_at, said_of = self._pinned.get((record.id, worker, epoch), (float("-inf"), 0))
        quota = self._quota_of(record.publisher)
        if quota is None or (held <= said_of and now - said_at < REPEAT_S):
            return
        cover = self._scopes.cover_of(model, record)
        token_ids = array("I", record.tokens)
        prefix = bytes.fromhex(record.id)
        ttl_s = min(PIN_S, published.expires_at - now)
        order = PinOrder(prefix, token_ids, cover.regions, cover.owners, ttl_s, quota)
        if self._fleet.pin(worker, order):
            self._pinned[record.id, worker, epoch] = now, held

    def _warm_again(self, record: PrefixRecord, worker: WorkerId) -> None:
        """Compute a copy that is missing, one at a time for each prefix and not too often."""
        now = self._catalog.clock()
        # The first time it is seen, whoever published it may be computing it still.
        since = now - self._warmed_at.setdefault(record.id, now)
        quota = self._quota_of(record.publisher)
        if self.warm is None or quota is None or not record.warm or since < WARM_AGAIN_S:
            return
        self._warmed_at[record.id] = now
        task = asyncio.create_task(
            self._warm(self.warm(record, worker, quota, asyncio.get_running_loop().time() + WARM_TIMEOUT_S))
        )
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    async def _warm(self, computing: Awaitable[None]) -> None:
        try:
            await computing
        except PandoError as error:
            log.info("a copy of a published prefix could not be computed: %s", error.reason)

    def _removed(self, record: PrefixRecord) -> None:
        self._warmed_at.pop(record.id, None)
        for key in [key for key in self._pinned if key[0] == record.id]:
            del self._pinned[key]
        self._fleet.unpin(bytes.fromhex(record.id))

    def _held(self, record: PrefixRecord, model: FleetModel) -> dict[WorkerId, int]:
        """Blocks of the prefix by worker, for all that are ready."""
        return self._fleet.holders(self._keys(self._scopes.cover_of(model, record), record, model))

    def _keys(self, cover: Cover, record: PrefixRecord, model: FleetModel) -> Sequence[BlockKey]:
        return block_keys(cover.regions, array("I", record.tokens), model.block_size)

    def _order(self, record: PrefixRecord, held: dict[WorkerId, int]) -> list[WorkerId]:
        """Most blocks first; the same on every router that has the same index."""
        return sorted(held, key=lambda worker: (-held[worker], -_weight(record.id, worker), worker))


def _weight(prefix_id: str, worker: WorkerId) -> int:
    return xxh3_64_intdigest(f"{prefix_id}/{worker}".encode())
