"""Publishing a prefix: may this tenant, is there room, compute it where it shall be, end it.

Knows no gRPC and no Redis: the registry keeps what is published, `pinning` keeps it resident. Invariant: a prefix that
is refused, or that no worker could compute when that was asked for, is not left behind.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from array import array
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from kvstore.block import WorkerId
from kvstore.scope import TenantId
from pando.errors import FieldViolation, NotFound, PandoError, PermissionDenied, ResourceExhausted, Unavailable
from router.dispatch import SamplingChoice, TokenRequest
from router.generation import TokenSource
from router.prefix_catalog import PrefixCatalog, PrefixRecord, Published
from router.prefix_registry import PrefixRegistry
from router.tenants import GROUP, KvQuota, Tenant

DEFAULT_TTL_S = 3600.0
MAX_TTL_S = 30 * 24 * 3600.0
MAX_COPIES = 64
MAX_NAME = 128

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Publication:
    """What a tenant asks to publish. `copies` is at least 1."""

    token_ids: array[int]  # 'I'
    audience: str
    group: str
    name: str
    copies: int
    warm: bool
    ttl_s: float


class Homes(Protocol):
    """Where prefixes are held: `router.pinning.Pinning`, or a test's stand-in."""

    def homes(self, record: PrefixRecord) -> Sequence[WorkerId]:
        """The workers that a prefix shall be computed on, at most as many as its copies."""

    async def settle(self, published: Published) -> None:
        """Called once it was computed."""


class Publishing:
    """The published prefixes of a fleet as one tenant sees them, for one event loop."""

    def __init__(
        self,
        registry: PrefixRegistry,
        source: TokenSource,
        homes: Homes,
        *,
        model: str,
        block_size: int,
    ) -> None:
        self._registry = registry
        self._catalog: PrefixCatalog = registry.catalog
        self._source = source
        self._homes = homes
        self._model = model
        self._block_size = block_size

    def clock(self) -> float:
        """The clock of `Published.expires_at`."""
        return self._catalog.clock()

    async def publish(self, tenant: Tenant, asked: Publication, deadline: float) -> Published:
        """Publish, and compute it first where that is asked for. `deadline` is a time of the event loop's clock."""
        self._check_grant(tenant, asked)
        record = PrefixRecord(
            id=secrets.token_hex(16),
            publisher=tenant.id,
            audience=asked.audience,
            group=asked.group,
            name=asked.name,
            model=self._model,
            tokens=asked.token_ids.tobytes(),
            copies=asked.copies,
            warm=asked.warm,
            created_ms=time.time_ns() // 1_000_000,
        )
        published = await self._registry.put(record, asked.ttl_s, lambda: self._check_budget(tenant, record))
        if asked.warm:
            await self._warm_or_withdraw(record, tenant.quota, deadline)
            await self._homes.settle(published)
        return published

    def get(self, tenant: Tenant, prefix_id: str) -> Published:
        """A prefix that the tenant may use. To everybody else it does not exist."""
        published = self._catalog.get(prefix_id, tenant.id, tenant.groups)
        if published is None:
            raise NotFound("no such prefix is published for this tenant", reason="PREFIX")
        return published

    def visible(self, tenant: Tenant) -> list[Published]:
        """All that the tenant may use, oldest first."""
        return self._catalog.visible(tenant.id, tenant.groups)

    async def delete(self, tenant: Tenant, prefix_id: str) -> None:
        """End a prefix of the tenant's own."""
        record = next((found for found in self._catalog.of(tenant.id) if found.id == prefix_id), None)
        if record is None:
            self.get(tenant, prefix_id)
            raise PermissionDenied("only who published a prefix can delete it", reason="PUBLISHER")
        await self._registry.delete(record)

    async def delete_all(self, publisher: TenantId) -> int:
        """End every prefix that a tenant published; how many these were."""
        records = self._catalog.of(publisher)
        for record in records:
            await self._registry.delete(record)
        return len(records)

    async def warm(self, record: PrefixRecord, worker: WorkerId, quota: KvQuota, deadline: float) -> None:
        """Compute a prefix's blocks on one worker within its publisher's quota; raises `pando.errors`."""
        request = TokenRequest(
            request_id=f"warm-{record.id}",
            tenant=TenantId(record.publisher),
            token_ids=array("I", record.tokens),
            sampling=SamplingChoice(max_tokens=1),
            deadline=deadline,
            quota=quota,
            warming=record,
            only=worker,
        )
        async with aclosing(self._source.stream(request)) as deltas:
            async for _ in deltas:
                pass

    # Checks

    def _check_grant(self, tenant: Tenant, asked: Publication) -> None:
        if asked.audience not in tenant.publish:
            raise PermissionDenied(f"the tenant may not publish in scope {asked.audience}", reason="PUBLISH")
        if asked.audience == GROUP and asked.group not in tenant.groups:
            raise NotFound("the tenant is in no such group", reason="GROUP")

    def _check_budget(self, tenant: Tenant, record: PrefixRecord) -> None:
        """Each copy counts in full, also what prefixes of one tenant have in common."""
        used = sum(self._charge(other) for other in self._catalog.of(tenant.id))
        wanted, budget = self._charge(record), tenant.quota.pinned
        if used + wanted > budget:
            raise ResourceExhausted(
                "the tenant's published prefixes are over its budget",
                reason="PUBLISH_BUDGET",
                violations=(FieldViolation(f"tenant:{tenant.id}", f"{used} of {budget} blocks used, {wanted} asked"),),
            )

    def _charge(self, record: PrefixRecord) -> int:
        return record.num_pinned(self._block_size) * record.copies

    # Computing

    async def _warm_or_withdraw(self, record: PrefixRecord, quota: KvQuota, deadline: float) -> None:
        try:
            await self._warm_homes(record, quota, deadline)
        except (PandoError, asyncio.CancelledError) as error:
            await asyncio.shield(self._withdraw(record))
            log.info("a prefix could not be computed and is not published: %s", type(error).__name__)
            raise

    async def _warm_homes(self, record: PrefixRecord, quota: KvQuota, deadline: float) -> None:
        """At least one has to be computed; the others follow later where they fail now."""
        homes = self._homes.homes(record)
        if not homes:
            raise Unavailable("no worker is ready", reason="NO_WORKER", retry_after_s=1.0)
        calls = (self.warm(record, worker, quota, deadline) for worker in homes)
        results = await asyncio.gather(*calls, return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if len(failures) == len(results) or any(not isinstance(failure, PandoError) for failure in failures):
            raise failures[0]

    async def _withdraw(self, record: PrefixRecord) -> None:
        try:
            await self._registry.delete(record)
        except Unavailable:
            log.warning("a prefix that could not be computed stays published until it ends: Redis is away")
