"""A router as a child process: started, told ready by its one line, asked for its workers, started again if it dies.

Knows the router's command line and admin port, nothing of what it serves.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass

from control.children import Child, source_path
from pando.admin_client import AdminClient
from pando.errors import ConfigError, Unavailable
from pando.settings import ENV_PREFIX, RouterSettings, narrow, secrets, to_flags
from pando.v1 import admin_pb2


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a router listens, each "host:port"."""

    router: str
    grpc: str
    http: str
    admin: str


class RouterRefused(ConfigError):
    """The router ended at its start and said why on stderr, which is ours."""


class RouterProcess:
    """One router. It keeps the ports it first got when it is started again."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._child: Child | None = None
        self._listening: Listening | None = None

    def start(self) -> None:
        """Start it and return at once; call from the main thread."""
        command = [sys.executable, "-P", "-m", "router", "--json", *to_flags(self._settings)]
        self._child = Child(command, env=_environment(self._settings), stdout=subprocess.PIPE)

    def wait_listening(self, timeout_s: float) -> Listening:
        """Until it says where it listens. Raises `RouterRefused` when it ends before that."""
        line = self._first_line(timeout_s)
        found = Listening(**{name: str(json.loads(line)[name]) for name in Listening.__slots__})
        self._settings = narrow(
            RouterSettings,
            self._settings,
            port=_port(found.grpc),
            http_port=_port(found.http),
            admin_port=_port(found.admin),
        )
        self._listening = found
        return found

    def workers(self) -> list[admin_pb2.Worker]:
        """The workers it knows; none while it does not answer."""
        assert self._listening is not None
        with AdminClient(_reachable(self._listening.admin), key=self._settings.admin_key) as admin:
            try:
                return admin.workers()
            except Unavailable:
                return []

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._child is not None and self._child.exit_code() is None

    def stop(self) -> None:
        """End it; may be called again."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def _first_line(self, timeout_s: float) -> bytes:
        assert self._child is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._child.stdout], [], [], left)[0]:
                raise ConfigError(f"the router was not ready after {timeout_s:g} s")
            more = os.read(self._child.stdout.fileno(), 4096)
            if not more:
                raise RouterRefused("the router could not start")
            line += more
        return line


def _environment(settings: RouterSettings) -> dict[str, str]:
    """Ours less all settings, which are on the command line, plus the secret ones."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return kept | secrets(settings) | {"PYTHONPATH": source_path()}


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _reachable(address: str) -> str:
    """A listener on every address is reached on loopback."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "::") else address
