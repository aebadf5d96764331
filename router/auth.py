"""Who is calling: bearer keys to tenants from a TOML file that reloads, or a named tenant on loopback.

Knows nothing of gRPC handlers. Invariant: a tenant comes from the credential alone; without a file of keys no address
but loopback is served.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kvstore.scope import TenantId
from pando.errors import ConfigError, InvalidRequest, Unauthenticated
from pando.settings import is_loopback
from router.tenants import AUDIENCES, Tenant, is_tenant_name, read_tenants

Metadata = Iterable[tuple[str, str | bytes]]

DEFAULT_TENANT = TenantId("default")
_MAX_KEY_CHARACTERS = 512
_RELOAD_SECONDS = 1.0

log = logging.getLogger(__name__)


class Authenticator(Protocol):
    """From a call's metadata to its tenant; raises `Unauthenticated`."""

    def tenant(self, metadata: Metadata) -> Tenant: ...

    def known(self) -> Sequence[TenantId]:
        """Tenants that have a record, whether or not they call."""

    def lookup(self, name: TenantId) -> Tenant | None:
        """What a tenant may do that is not calling; None where nobody of this name has a record."""


def make_key() -> tuple[str, str]:
    """A new random key and the line that stands for it in the tenants file: (key, "sha256:<hex>")."""
    key = f"pando_{secrets.token_urlsafe(32)}"
    return key, key_hash(key)


def check_tenant_name(name: str) -> None:
    """Raise `ConfigError` for what cannot be the name of a tenant."""
    if not is_tenant_name(name):
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
    """Without keys, on loopback: `x-pando-tenant` names the tenant, which may publish to all and is in no group."""

    def tenant(self, metadata: Metadata) -> Tenant:
        names = [value for name, value in metadata if name == "x-pando-tenant"]
        if not names:
            return self.lookup(DEFAULT_TENANT)
        if len(names) > 1 or not isinstance(names[0], str) or not is_tenant_name(names[0]):
            raise InvalidRequest("x-pando-tenant must be one name of up to 64 letters, digits, '.', '_' or '-'")
        return self.lookup(TenantId(names[0]))

    def known(self) -> Sequence[TenantId]:
        return ()

    def lookup(self, name: TenantId) -> Tenant:
        return Tenant(name, publish=frozenset(AUDIENCES))


class KeyedTenants:
    """Keys of a TOML file, `[tenants.NAME] keys = ["sha256:..."]`. A change is seen within a second."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._stamp = _stamp(path)
        self._file = read_tenants(path)
        self._checked = clock()

    def tenant(self, metadata: Metadata) -> Tenant:
        self._reload_if_changed()
        digest = _digest(_bearer(metadata))
        # Found by digest: the time of the look-up tells nothing about any key.
        tenant = self._file.by_digest.get(digest)
        if tenant is None:
            raise Unauthenticated("the key is not valid")
        return tenant

    def known(self) -> Sequence[TenantId]:
        return tuple(self._file.by_name)

    def lookup(self, name: TenantId) -> Tenant | None:
        self._reload_if_changed()
        return self._file.by_name.get(name)

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
            self._file = read_tenants(self._path)
            log.info("tenants file reloaded: %d keys", len(self._file.by_digest))
        except ConfigError as error:
            log.error("tenants file not reloaded, the keys before it stay: %s", error.message)


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
