"""Everything a router needs to share prefixes between tenants, put together: catalog, registry, scopes, pinning.

Knows its parts by their faces only. Invariant: requests find a prefix from the moment it is in the catalog; all else
goes on beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.scope import TenantId
from router.auth import Authenticator
from router.dispatch import Dispatch
from router.fleet import Fleet
from router.pinning import Pinning
from router.prefix_registry import PrefixRegistry
from router.publishing import Publishing
from router.purging import Purging
from router.scopes import Scopes
from router.tenants import KvQuota


class PrefixSharing:
    """The published prefixes of one router. `dispatch` is the one that knows them."""

    def __init__(
        self,
        fleet: Fleet,
        authenticator: Authenticator,
        registry: PrefixRegistry,
        *,
        secret: bytes,
        model: str,
        block_size: int,
    ) -> None:
        """Starts and stops the registry too."""
        self._authenticator = authenticator
        self._registry = registry
        self.catalog = registry.catalog
        scopes = Scopes(secret, self.catalog)
        self.dispatch = Dispatch(fleet, scopes)
        self.pinning = Pinning(fleet, self.catalog, scopes, self._quota_of)
        self.publishing = Publishing(registry, self.dispatch, self.pinning, model=model, block_size=block_size)
        self.pinning.warm = self.publishing.warm
        self.purging = Purging(
            scopes, lambda: fleet.model_spec, self._groups_of, self.publishing.delete_all, fleet.purge
        )

    async def start(self) -> None:
        """Follow the registry and keep prefixes resident."""
        await self._registry.start()
        await self.pinning.start()

    async def stop(self) -> None:
        """Leave everything as it is for other routers. Idempotent."""
        await self.pinning.stop()
        await self._registry.stop()

    def _quota_of(self, publisher: str) -> KvQuota | None:
        tenant = self._authenticator.lookup(TenantId(publisher))
        return None if tenant is None else tenant.quota

    def _groups_of(self, tenant: TenantId) -> Sequence[str]:
        record = self._authenticator.lookup(tenant)
        return () if record is None else record.groups
