"""Who may start a request now: limits on requests in flight, and request ids that are in use.

Knows counts only. Invariant: every entry is given back once, whatever way the request ends.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.scope import TenantId
from pando.errors import AlreadyExists, FieldViolation, ResourceExhausted
from router.tenants import Tenant

RETRY_AFTER_S = 0.5


class Admission:
    """Requests in flight of one router, by tenant and id. For one event loop."""

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._ids: dict[TenantId, set[str]] = {}
        self._total = 0

    @property
    def in_flight(self) -> int:
        """Requests of all tenants."""
        return self._total

    def in_flight_of(self, tenant: TenantId) -> int:
        """Requests of one tenant."""
        return len(self._ids.get(tenant, ()))

    @contextmanager
    def enter(self, tenant: Tenant, request_id: str) -> Iterator[str]:
        """Count a request for as long as the block runs; gives its id, a new one where none was chosen."""
        if self._total >= self._max_in_flight:
            raise ResourceExhausted(
                "the router serves as many requests as it can", reason="ROUTER_BUSY", retry_after_s=RETRY_AFTER_S
            )
        self._check_tenant(tenant, request_id)
        request_id = request_id or secrets.token_hex(12)
        ids = self._ids.setdefault(tenant.id, set())
        ids.add(request_id)
        self._total += 1
        try:
            yield request_id
        finally:
            self._total -= 1
            ids.discard(request_id)
            if not ids:
                self._ids.pop(tenant.id, None)

    def _check_tenant(self, tenant: Tenant, request_id: str) -> None:
        ids = self._ids.get(tenant.id, ())
        if request_id and request_id in ids:
            raise AlreadyExists("a request of this id is in flight", reason="REQUEST_ID")
        if tenant.max_in_flight and len(ids) >= tenant.max_in_flight:
            limit = f"at most {tenant.max_in_flight} requests in flight"
            raise ResourceExhausted(
                "the tenant has as many requests in flight as it may have",
                reason="TENANT_IN_FLIGHT",
                violations=(FieldViolation(f"tenant:{tenant.id}", limit),),
                retry_after_s=RETRY_AFTER_S,
            )
