"""Who may start a request now: this router's own bound, request ids in use, and what the tenant may have of the fleet.

Knows counts only. Invariant: every entry is given back once, whatever way the request ends.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvstore.scope import TenantId
from pando.errors import AlreadyExists, FieldViolation, ResourceExhausted
from router.limits import FleetLimits
from router.tenants import Tenant

RETRY_AFTER_S = 0.5
KEPT = 8
"""One in so many of a router's places is kept for tenants that have fewer than those there."""


class Admission:
    """Requests in flight of one router, by tenant and id. For one event loop."""

    def __init__(self, max_in_flight: int, limits: FleetLimits | None = None) -> None:
        self._max_in_flight = max_in_flight
        self._limits = limits or FleetLimits(None, clock=time.monotonic)
        self._ids: dict[TenantId, set[str]] = {}
        self._total = 0

    @property
    def in_flight(self) -> int:
        """Requests of all tenants."""
        return self._total

    def in_flight_of(self, tenant: TenantId) -> int:
        """Requests of one tenant."""
        return len(self._ids.get(tenant, ()))

    @asynccontextmanager
    async def enter(self, tenant: Tenant, request_id: str) -> AsyncIterator[str]:
        """Count a request for as long as the block runs; gives its id, a new one where none was chosen."""
        if self._total >= self._most_for(tenant.id):
            raise ResourceExhausted(
                "the router serves as many requests as it can", reason="ROUTER_BUSY", retry_after_s=RETRY_AFTER_S
            )
        if request_id and request_id in self._ids.get(tenant.id, ()):
            raise AlreadyExists("a request of this id is in flight", reason="REQUEST_ID")
        request_id = request_id or secrets.token_hex(12)
        ids = self._ids.setdefault(tenant.id, set())
        ids.add(request_id)
        self._total += 1
        try:
            await self._enter_fleet(tenant)
            try:
                yield request_id
            finally:
                self._limits.leave(tenant)
        finally:
            self._total -= 1
            ids.discard(request_id)
            if not ids:
                self._ids.pop(tenant.id, None)

    async def charge(self, tenant: Tenant, prompt_tokens: int) -> None:
        """Count a prompt against the tenant's rate; raises where it has to wait."""
        wait = await self._limits.spend(tenant, prompt_tokens)
        if wait:
            raise _over_rate(tenant, wait, f"at most {tenant.prompt_tokens_per_s:g} prompt tokens a second")

    def _most_for(self, tenant: TenantId) -> int:
        """How many requests of all there may be for one more of this tenant: a flood leaves some room to others."""
        kept = self._max_in_flight // KEPT
        return self._max_in_flight if self.in_flight_of(tenant) < kept else self._max_in_flight - kept

    async def _enter_fleet(self, tenant: Tenant) -> None:
        busy, late = await self._limits.enter(tenant)
        if busy:
            limit = f"at most {tenant.max_in_flight} requests in flight"
            raise ResourceExhausted(
                "the tenant has as many requests in flight as it may have",
                reason="TENANT_IN_FLIGHT",
                violations=(FieldViolation(f"tenant:{tenant.id}", limit),),
                retry_after_s=busy,
            )
        if late:
            raise _over_rate(tenant, late, f"at most {tenant.requests_per_s:g} requests a second")


def _over_rate(tenant: Tenant, wait_s: float, limit: str) -> ResourceExhausted:
    return ResourceExhausted(
        "the tenant asks for more than its rate",
        reason="TENANT_RATE",
        violations=(FieldViolation(f"tenant:{tenant.id}", limit),),
        retry_after_s=wait_s,
    )
