"""What can be known to be wrong with a command's settings before anything is started: seconds, no half-started fleet.

Knows settings, ports and files; loads neither Ray nor torch. Every finding is one `ConfigError`.
"""

from __future__ import annotations

import socket
from pathlib import Path

from control.redis_server import find_binary
from kvstore.redis_url import why_no_answer
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import CrewSettings, UpSettings
from router.auth import check_admin_key, open_authenticator
from worker.checks import check_model, check_settings
from worker.link_guard import check_link_token


def check(settings: UpSettings) -> None:
    """Raises `ConfigError` on what `pando up` cannot start with."""
    _check_crew(settings)
    folder = resolve_model(settings.model)
    check_model(settings, folder)
    _check_tokenizer(settings.model, folder)
    open_authenticator(settings.tenants, settings.host)
    check_admin_key(settings.admin_key, settings.host)
    _check_ports(settings)
    if settings.redis:
        _check_redis(settings.redis_url)
    elif settings.ray:
        raise ConfigError("--ray needs --redis: workers elsewhere cannot reach a Redis of our own")
    else:
        find_binary()


def check_workers(settings: CrewSettings) -> None:
    """Raises `ConfigError` on what `pando workers` cannot start with; a joined Ray's nodes have their own models."""
    _check_crew(settings)
    if not settings.redis:
        raise ConfigError("--redis URL is needed: routers find these workers through it")
    check_link_token(settings.link_token, settings.host)
    _check_redis(settings.redis_url)
    if not settings.ray:
        check_model(settings, resolve_model(settings.model))


def _check_crew(settings: CrewSettings) -> None:
    if settings.workers < 1:
        raise ConfigError("--workers must be at least 1")
    check_settings(settings)


def _check_redis(url: str) -> None:
    if reason := why_no_answer(url):
        raise ConfigError(reason)


def _check_tokenizer(model: str, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"--model {model}: the folder has no tokenizer.json")


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
