"""What can be known to be wrong with `pando up` before anything is started: seconds, not a half-started fleet.

Knows settings, ports and files; loads no Ray. Every finding is one `ConfigError`.
"""

from __future__ import annotations

import socket

from control.redis_server import check_reachable, find_binary
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import UpSettings
from router.auth import check_admin_key, open_authenticator


def check(settings: UpSettings) -> None:
    """What can be known to be wrong before anything is started; raises `ConfigError`."""
    if settings.workers < 1:
        raise ConfigError("--workers must be at least 1")
    resolve_model(settings.model)
    open_authenticator(settings.tenants, settings.host)
    check_admin_key(settings.admin_key, settings.host)
    _check_ports(settings)
    if settings.redis:
        check_reachable(settings.redis)
    elif settings.ray:
        raise ConfigError("--ray needs --redis: workers elsewhere cannot reach a Redis of our own")
    else:
        find_binary()


def _check_ports(settings: UpSettings) -> None:
    wanted = {"--port": settings.port, "--http-port": settings.http_port, "--admin-port": settings.admin_port}
    fixed = {flag: port for flag, port in wanted.items() if port}
    if len(set(fixed.values())) < len(fixed):
        raise ConfigError("--port, --http-port and --admin-port must differ")
    for flag, port in fixed.items():
        check_port(settings.host, port, flag)


def check_port(host: str, port: int, flag: str) -> None:
    """Raises `ConfigError` when something listens there or the address is not ours."""
    if port > 65535:
        raise ConfigError(f"{flag} {port} is no port number")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({flag}): {error.strerror or error}") from error
