"""Purging a tenant: its published prefixes end, and every worker forgets the blocks that are charged to it.

Knows names and roots; the fleet does it. Invariant: an answer without an error means that every worker the router knows
has answered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from kvstore.block import WorkerId
from kvstore.scope import ScopeRoot, TenantId
from pando.errors import InvalidRequest, Unavailable
from router.link_messages import Purged
from router.scopes import ModelKeys, Scopes
from router.tenants import is_tenant_name

TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What was removed. `remaining_blocks` are held by requests that run still; nobody can find them."""

    device_blocks: int
    cpu_blocks: int
    remaining_blocks: int
    workers: int
    prefixes: int


class Purging:
    """Removes what a tenant has in the fleet's caches."""

    def __init__(
        self,
        scopes: Scopes,
        model: Callable[[], ModelKeys | None],
        groups_of: Callable[[TenantId], Sequence[str]],
        delete_prefixes: Callable[[TenantId], Awaitable[int]],
        purge_workers: Callable[[Sequence[ScopeRoot], float], Awaitable[dict[WorkerId, Purged | None]]],
    ) -> None:
        self._scopes = scopes
        self._model = model
        self._groups_of = groups_of
        self._delete_prefixes = delete_prefixes
        self._purge_workers = purge_workers

    async def purge(self, tenant: TenantId) -> PurgeReport:
        """Purge, whether or not the tenant has a record. Raises `Unavailable` naming workers that did not answer."""
        if not is_tenant_name(tenant):
            raise InvalidRequest("tenant is not the name of one")
        model = self._model()
        # Before its prefixes go: they say in which groups it published.
        roots = [] if model is None else self._scopes.roots_of(model, tenant, self._groups_of(tenant))
        prefixes = await self._delete_prefixes(tenant)
        answers = await self._purge_workers(roots, TIMEOUT_S) if roots else {}
        silent = sorted(worker for worker, answer in answers.items() if answer is None)
        if silent:
            raise Unavailable(f"not purged: no answer from {', '.join(silent)}", reason="PURGE_INCOMPLETE")
        purged = [answer for answer in answers.values() if answer is not None]
        return PurgeReport(
            device_blocks=sum(answer.device_blocks for answer in purged),
            cpu_blocks=sum(answer.cpu_blocks for answer in purged),
            remaining_blocks=sum(answer.remaining for answer in purged),
            workers=len(purged),
            prefixes=prefixes,
        )
