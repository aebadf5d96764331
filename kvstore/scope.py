"""Scopes: who may share KV, as 16-byte roots that start every key chain.

Knows nothing of blocks or of how tenants authenticate. Invariant: different inputs are encoded differently, so two
scopes share a root only if BLAKE2b collides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

ScopeRoot = NewType("ScopeRoot", bytes)
TenantId = NewType("TenantId", str)

PUBLIC_SCOPE = "public"
KEY_VERSION = 1
"""Raised when roots or keys are made differently: processes of two versions never share."""

_ROOT_BYTES = 16
_MAX_BLAKE2B_KEY = 64


@dataclass(frozen=True, slots=True)
class Region:
    """A run of token positions that belong to one scope. `end` is exclusive; None reaches over all generated tokens."""

    root: ScopeRoot
    end: int | None


def tenant_scope(tenant: TenantId) -> str:
    """The scope id that only this tenant has."""
    return f"tenant:{tenant}"


def group_scope(group: str) -> str:
    """The scope id that a share group has."""
    return f"group:{group}"


def scope_root(
    secret: bytes, model_fingerprint: bytes, scope_id: str, *, block_size: int, adapter: str = ""
) -> ScopeRoot:
    """The 16-byte root of a scope for one model, block size and adapter.

    `secret` is the cluster's, at least one byte; without it nobody can tell which scope a root belongs to.
    """
    if not secret:
        raise ValueError("a scope root needs a cluster secret")
    key = secret if len(secret) <= _MAX_BLAKE2B_KEY else hashlib.blake2b(secret).digest()
    message = frame("scope", _number(KEY_VERSION), model_fingerprint, _number(block_size), adapter, scope_id)
    return ScopeRoot(hashlib.blake2b(message, key=key, digest_size=_ROOT_BYTES, person=b"pando.scope").digest())


def check_regions(regions: Sequence[Region]) -> None:
    """Raise ValueError unless the ends grow and exactly the last region is open."""
    if not regions or regions[-1].end is not None:
        raise ValueError("the last region must reach to the end")
    before = 0
    for region in regions[:-1]:
        if region.end is None or region.end < before:
            raise ValueError("region ends must grow, and only the last one is open")
        before = region.end
    if any(len(region.root) != _ROOT_BYTES for region in regions):
        raise ValueError("a scope root has 16 bytes")


def frame(domain: str, *fields: bytes | str) -> bytes:
    """An injective encoding of the domain and the fields: each one preceded by its length as little-endian u64."""
    parts: list[bytes] = []
    for field in (domain, *fields):
        raw = field.encode() if isinstance(field, str) else field
        parts += (_number(len(raw)), raw)
    return b"".join(parts)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
