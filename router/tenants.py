"""Tenants and what each may use, read from a TOML file: keys, groups, publishing, quotas.

Knows no gRPC and no network. Invariant: what the file does not grant is not granted; a file with anything unknown in it
is refused as a whole.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.scope import TenantId
from pando.errors import ConfigError

OWN, GROUP, PUBLIC = "own", "group", "public"
AUDIENCES = (OWN, GROUP, PUBLIC)

DEFAULT_PUBLISH = frozenset({OWN, GROUP})
DEFAULT_PUBLISH_BUDGET_BLOCKS = 4096
MAX_GROUPS = 16
MAX_WEIGHT = 1000
MAX_BLOCKS = 2**31 - 1
"""The wire has 32 bits for a number of blocks."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class KvQuota:
    """KV blocks that a tenant may have on each worker. A floor is always its own; a ceiling of None is none.

    `pinned` is its budget for published prefixes: over the whole fleet, each copy counted, so also on one worker.
    """

    device_floor: int = 0
    device_ceiling: int | None = None
    cpu_floor: int = 0
    cpu_ceiling: int | None = None
    pinned: int = DEFAULT_PUBLISH_BUDGET_BLOCKS


NO_QUOTA = KvQuota()


@dataclass(frozen=True, slots=True)
class Tenant:
    """An authenticated caller and what it may use of the fleet, through all routers together; 0 sets no limit.

    `weight` is its share of busy workers, beside others with theirs; `publish` says with whom it may share prefixes.
    `ttft_s` is the time to first token that it shall get or be refused; 0 for none.
    """

    id: TenantId
    max_in_flight: int = 0
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    weight: int = 1
    groups: tuple[str, ...] = ()
    publish: frozenset[str] = DEFAULT_PUBLISH
    quota: KvQuota = NO_QUOTA
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TenantsFile:
    """What one reading of the file found: tenants by the SHA-256 of their keys, and by name in the file's order."""

    by_digest: Mapping[bytes, Tenant]
    by_name: Mapping[TenantId, Tenant]


def is_tenant_name(name: str) -> bool:
    """Whether a tenant or a group may be called so: up to 64 letters, digits, '.', '_' or '-'."""
    return _NAME.fullmatch(name) is not None


def read_tenants(path: Path) -> TenantsFile:
    """Read the file. `ConfigError` names the first thing wrong with it."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the tenants file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the tenants file {path} is not TOML: {error}") from error
    tenants = document.pop("tenants", {})
    if document or not isinstance(tenants, dict) or not tenants:
        raise ConfigError(f"the tenants file {path} must hold [tenants.NAME] tables and nothing else")
    found: dict[bytes, Tenant] = {}
    by_name: dict[TenantId, Tenant] = {}
    for name, record in tenants.items():
        tenant, digests = _read_tenant(name, record)
        by_name[tenant.id] = tenant
        for digest in digests:
            if digest in found:
                raise ConfigError(f"tenants '{found[digest].id}' and '{name}' have the same key")
            found[digest] = tenant
    return TenantsFile(found, by_name)


def _read_tenant(name: str, record: Any) -> tuple[Tenant, list[bytes]]:
    if not is_tenant_name(name):
        raise ConfigError(f"tenant name '{name}' is not up to 64 letters, digits, '.', '_' or '-'")
    unknown = sorted(set(record) - _SETTINGS) if isinstance(record, dict) else [str(record)]
    if unknown:
        raise ConfigError(f"tenant '{name}' has settings other than {', '.join(sorted(_SETTINGS))}: {unknown[0]}")
    keys = record.get("keys")
    if not isinstance(keys, list) or not keys:
        raise ConfigError(f"tenant '{name}' has no list of keys")
    tenant = Tenant(
        TenantId(name),
        _count(name, record, "max_in_flight") or 0,
        requests_per_s=_rate(name, record, "requests_per_s"),
        prompt_tokens_per_s=_rate(name, record, "prompt_tokens_per_s"),
        weight=_weight(name, record),
        groups=_groups(name, record),
        publish=_publish(name, record),
        quota=_quota(name, record),
        ttft_s=(_count(name, record, "ttft_target_ms") or 0) / 1e3,
    )
    return tenant, [_parse_hash(name, key) for key in keys]


_QUOTAS = ("device_floor_blocks", "device_ceiling_blocks", "cpu_floor_blocks", "cpu_ceiling_blocks")
_LIMITS = ("max_in_flight", "requests_per_s", "prompt_tokens_per_s", "weight", "ttft_target_ms")
_SETTINGS = {"keys", "groups", "publish", "publish_budget_blocks", *_LIMITS, *_QUOTAS}


def _quota(name: str, record: Mapping[str, Any]) -> KvQuota:
    device_floor, device_ceiling, cpu_floor, cpu_ceiling = (_count(name, record, key) for key in _QUOTAS)
    for tier, floor, ceiling in (("device", device_floor, device_ceiling), ("cpu", cpu_floor, cpu_ceiling)):
        if ceiling is not None and ceiling < (floor or 0):
            raise ConfigError(f"{tier}_ceiling_blocks of tenant '{name}' is below its {tier}_floor_blocks")
    budget = _count(name, record, "publish_budget_blocks")
    pinned = DEFAULT_PUBLISH_BUDGET_BLOCKS if budget is None else budget
    return KvQuota(device_floor or 0, device_ceiling, cpu_floor or 0, cpu_ceiling, pinned)


def _groups(name: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    groups = _names(name, record, "groups", ())
    for group in groups:
        if not is_tenant_name(group):
            raise ConfigError(f"group '{group}' of tenant '{name}' is not up to 64 letters, digits, '.', '_' or '-'")
    if len(groups) > MAX_GROUPS:
        raise ConfigError(f"tenant '{name}' is in more than {MAX_GROUPS} groups")
    return groups


def _publish(name: str, record: Mapping[str, Any]) -> frozenset[str]:
    publish = frozenset(_names(name, record, "publish", tuple(DEFAULT_PUBLISH)))
    if not publish <= set(AUDIENCES):
        raise ConfigError(f"publish of tenant '{name}' may list {', '.join(AUDIENCES)} and nothing else")
    return publish


def _names(name: str, record: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    names = record.get(key, default)
    if not isinstance(names, (list, tuple)) or not all(isinstance(entry, str) for entry in names):
        raise ConfigError(f"{key} of tenant '{name}' must be a list of names")
    return tuple(dict.fromkeys(names))


def _count(name: str, record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BLOCKS:
        raise ConfigError(f"{key} of tenant '{name}' must be a whole number, 0 or more")
    return value


def _rate(name: str, record: Mapping[str, Any], key: str) -> float:
    value = record.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"{key} of tenant '{name}' must be a number a second, 0 or more")
    return float(value)


def _weight(name: str, record: Mapping[str, Any]) -> int:
    weight = _count(name, record, "weight")
    if weight is not None and not 1 <= weight <= MAX_WEIGHT:
        raise ConfigError(f"weight of tenant '{name}' must be from 1 to {MAX_WEIGHT}")
    return weight or 1


def _parse_hash(name: str, key: Any) -> bytes:
    match = _KEY_HASH.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise ConfigError(f"a key of tenant '{name}' is not sha256: and 64 hex digits")
    return bytes.fromhex(match[1])
