"""From tenants, published prefixes and tokens to the scope roots that key a sequence, and who is charged for each.

The only place that knows how scope ids are made for requests. Invariant: every sequence ends in its own tenant's scope,
and a published scope covers only tokens of a prefix that the tenant may use.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvstore.block_key import token_bytes
from kvstore.scope import PUBLIC_SCOPE, Region, ScopeRoot, TenantId, group_scope, scope_root, tenant_scope
from router.prefix_catalog import PrefixCatalog, PrefixRecord
from router.tenants import GROUP, OWN


class ModelKeys(Protocol):
    """What of a fleet's model goes into a root."""

    @property
    def model_fingerprint(self) -> bytes: ...

    @property
    def block_size(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Cover:
    """The regions of a sequence, and beside each the root of the tenant that its blocks are charged to."""

    regions: tuple[Region, ...]
    owners: tuple[ScopeRoot, ...]


class Scopes:
    """Makes roots and regions with the cluster's secret."""

    def __init__(self, secret: bytes, catalog: PrefixCatalog | None = None) -> None:
        """Without a catalog nothing is shared between tenants."""
        self._secret = secret
        self._catalog = PrefixCatalog() if catalog is None else catalog

    def cover(self, model: ModelKeys, tenant: TenantId, groups: Sequence[str], token_ids: array[int]) -> Cover:
        """The regions of a tenant's prompt: the longest published head that has a full block, then its own scope."""
        shared = self._catalog.longest(tenant, groups, token_bytes(token_ids)) if len(self._catalog) else None
        if shared is None or shared.num_tokens < model.block_size:
            return self._own(model, tenant)
        return self._headed(model, tenant, shared.record, shared.num_tokens)

    def cover_of(self, model: ModelKeys, record: PrefixRecord) -> Cover:
        """The regions in which a published prefix itself is computed and pinned."""
        return self._headed(model, TenantId(record.publisher), record, record.num_tokens)

    def roots_of(self, model: ModelKeys, tenant: TenantId, groups: Iterable[str]) -> list[ScopeRoot]:
        """Every root whose blocks are charged to the tenant: its own and those it published, or could, in `groups`."""
        published = {group_scope(group) for group in groups} | {PUBLIC_SCOPE}
        published |= {_audience_scope(record) for record in self._catalog.of(tenant) if record.audience != OWN}
        ids = (tenant_scope(tenant), *(_published_scope(scope, tenant) for scope in sorted(published)))
        return [self._root(model, scope_id) for scope_id in ids]

    def _own(self, model: ModelKeys, tenant: TenantId) -> Cover:
        root = self._root(model, tenant_scope(tenant))
        return Cover((Region(root, None),), (root,))

    def _headed(self, model: ModelKeys, tenant: TenantId, record: PrefixRecord, end: int) -> Cover:
        """A prefix that a tenant keeps to itself is keyed in its own scope: it is pinned, and no region of its own."""
        own = self._own(model, tenant)
        if record.audience == OWN:
            return own
        publisher = TenantId(record.publisher)
        head = self._root(model, _published_scope(_audience_scope(record), publisher))
        owner = self._root(model, tenant_scope(publisher))
        return Cover((Region(head, end), *own.regions), (owner, *own.owners))

    def _root(self, model: ModelKeys, scope_id: str) -> ScopeRoot:
        return scope_root(self._secret, model.model_fingerprint, scope_id, block_size=model.block_size)


def _audience_scope(record: PrefixRecord) -> str:
    return group_scope(record.group) if record.audience == GROUP else PUBLIC_SCOPE


def _published_scope(audience_scope: str, publisher: TenantId) -> str:
    """One scope for each publisher and audience, so that all its blocks have one payer. Names hold no colon."""
    return f"{audience_scope}:by:{publisher}"
