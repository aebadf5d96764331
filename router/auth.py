"""Who is calling: bearer keys to tenants from a TOML file that reloads, or a named tenant on loopback.

Knows nothing of gRPC handlers. Invariant: a tenant comes from the credential alone; without a file of keys no address
but loopback is served.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvstore.scope import TenantId
from pando.errors import ConfigError, InvalidRequest, Unauthenticated
from pando.settings import is_loopback

Metadata = Iterable[tuple[str, str | bytes]]

DEFAULT_TENANT = TenantId("default")
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_MAX_KEY_CHARACTERS = 512
_RELOAD_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """An authenticated caller and what it may use. `max_in_flight` 0 sets no limit of its own."""

    id: TenantId
    max_in_flight: int = 0


class Authenticator(Protocol):
    """From a call's metadata to its tenant; raises `Unauthenticated`."""

    def tenant(self, metadata: Metadata) -> Tenant: ...


def make_key() -> tuple[str, str]:
    """A new random key and the line that stands for it in the tenants file: (key, "sha256:<hex>")."""
    key = f"pando_{secrets.token_urlsafe(32)}"
    return key, key_hash(key)


def check_tenant_name(name: str) -> None:
    """Raise `ConfigError` for what cannot be the name of a tenant."""
    if not _TENANT.fullmatch(name):
        raise ConfigError(f"tenant name '{name}' is not up to 64 letters, digits, '.', '_' or '-'")


def key_hash(key: str) -> str:
    """How a key is written in the tenants file."""
    return f"sha256:{_digest(key).hex()}"


def open_authenticator(tenants_file: str, host: str, *, clock: Callable[[], float] = time.monotonic) -> Authenticator:
    """Keys from the file if one is named, else the open door, which only a loopback address may have."""
    if tenants_file:
        return KeyedTenants(Path(tenants_file), clock=clock)
    if not is_loopback(host):
        raise ConfigError(f"host {host} is not loopback: name a file of tenants and keys with --tenants")
    return NamedTenants()


def check_admin_key(admin_key: str, host: str) -> None:
    """Raise `ConfigError` if the admin port would be open on an address others can reach."""
    if not admin_key and not is_loopback(host):
        raise ConfigError(f"host {host} is not loopback: set an admin key with PANDO_ADMIN_KEY")


def require_admin(admin_key: str, metadata: Metadata) -> None:
    """Let a call to the admin port pass, or raise `Unauthenticated`. An empty key lets every call pass."""
    if admin_key and not hmac.compare_digest(_digest(_bearer(metadata)), _digest(admin_key)):
        raise Unauthenticated("the admin key is not valid")


class NamedTenants:
    """Without keys, on loopback: `x-pando-tenant` names the tenant."""

    def tenant(self, metadata: Metadata) -> Tenant:
        names = [value for name, value in metadata if name == "x-pando-tenant"]
        if not names:
            return Tenant(DEFAULT_TENANT)
        if len(names) > 1 or not isinstance(names[0], str) or not _TENANT.fullmatch(names[0]):
            raise InvalidRequest("x-pando-tenant must be one name of up to 64 letters, digits, '.', '_' or '-'")
        return Tenant(TenantId(names[0]))


class KeyedTenants:
    """Keys of a TOML file, `[tenants.NAME] keys = ["sha256:..."]`. A change is seen within a second."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        self._by_digest = read_tenants(path)
        self._checked = clock()

    def tenant(self, metadata: Metadata) -> Tenant:
        self._reload_if_changed()
        digest = _digest(_bearer(metadata))
        # Found by digest: the time of the look-up tells nothing about any key.
        tenant = self._by_digest.get(digest)
        if tenant is None:
            raise Unauthenticated("the key is not valid")
        return tenant

    def _reload_if_changed(self) -> None:
        now = self._clock()
        if now - self._checked < _RELOAD_SECONDS:
            return
        self._checked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._by_digest = read_tenants(self._path)
            log.info("tenants file reloaded: %d keys", len(self._by_digest))
        except ConfigError as error:
            log.error("tenants file not reloaded, the keys before it stay: %s", error.message)


def read_tenants(path: Path) -> dict[bytes, Tenant]:
    """Tenants by the SHA-256 of their keys. `ConfigError` names the first thing wrong with the file."""
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
    for name, record in tenants.items():
        for digest, tenant in _keys_of(name, record):
            if digest in found:
                raise ConfigError(f"tenants '{found[digest].id}' and '{name}' have the same key")
            found[digest] = tenant
    return found


def _keys_of(name: str, record: Any) -> list[tuple[bytes, Tenant]]:
    check_tenant_name(name)
    if not isinstance(record, dict) or not set(record) <= {"keys", "max_in_flight"}:
        raise ConfigError(f"tenant '{name}' has settings other than keys and max_in_flight")
    limit, keys = record.get("max_in_flight", 0), record.get("keys")
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ConfigError(f"max_in_flight of tenant '{name}' must be a whole number, 0 or more")
    if not isinstance(keys, list) or not keys:
        raise ConfigError(f"tenant '{name}' has no list of keys")
    return [(_parse_hash(name, key), Tenant(TenantId(name), limit)) for key in keys]


def _parse_hash(name: str, key: Any) -> bytes:
    match = _KEY_HASH.fullmatch(key) if isinstance(key, str) else None
    if match is None:
        raise ConfigError(f"a key of tenant '{name}' is not sha256: and 64 hex digits")
    return bytes.fromhex(match[1])


def _bearer(metadata: Metadata) -> str:
    """The key of the one authorization header; raises `Unauthenticated` if there is none, or more than one."""
    values = [value for name, value in metadata if name == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        raise Unauthenticated("send one header 'authorization: Bearer <key>'")
    kind, _, key = values[0].partition(" ")
    if kind.lower() != "bearer" or not key or len(key) > _MAX_KEY_CHARACTERS:
        raise Unauthenticated("send one header 'authorization: Bearer <key>'")
    return key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def _stamp(path: Path) -> Mapping[str, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return {"modified": found.st_mtime_ns, "size": found.st_size, "inode": found.st_ino}
