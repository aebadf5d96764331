"""Router processes that share one gRPC port: the kernel spreads connections over them, each has its own other ports.

Knows how to start, watch and end them. Invariant: all have one cluster secret and one port, also after a restart.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from control.router_process import Listening, RouterProcess
from pando.errors import ConfigError
from pando.settings import RouterSettings
from pando.v1 import admin_pb2

MAX_PROCESSES = 64
PORTS_EACH = 2
"""HTTP and admin port of each process are this far from those of the one before it."""
RESTART_S = 30.0


class RouterGroup:
    """`settings.processes` routers. The first one's HTTP and admin ports are those of the settings."""

    def __init__(self, settings: RouterSettings) -> None:
        if not 1 <= settings.processes <= MAX_PROCESSES:
            raise ConfigError(f"--processes must be from 1 to {MAX_PROCESSES}")
        if settings.processes > 1:
            settings = replace(
                settings, cluster_secret=settings.cluster_secret or secrets.token_hex(32), reuse_port="on"
            )
        self._settings = settings
        self._routers = [RouterProcess(self._settings_of(0, settings.port))]

    def start(self) -> None:
        """Start the first and return at once; call from the main thread."""
        self._routers[0].start()

    def wait_listening(self, timeout_s: float) -> list[Listening]:
        """Until all listen. Raises `RouterRefused` when one ends before that; call from the main thread."""
        deadline = time.monotonic() + timeout_s
        first = self._routers[0].wait_listening(timeout_s)
        port = int(first.grpc.rpartition(":")[2])
        others = [RouterProcess(self._settings_of(number, port)) for number in range(1, self._settings.processes)]
        self._routers += others
        for router in others:
            router.start()
        return [first, *(router.wait_listening(deadline - time.monotonic()) for router in others)]

    def workers(self) -> list[admin_pb2.Worker]:
        """The workers that all of them know."""
        known = [{(worker.id, worker.epoch, worker.state): worker for worker in r.workers()} for r in self._routers]
        return [worker for key, worker in known[0].items() if all(key in other for other in known)]

    def alive(self) -> bool:
        """Whether all run."""
        return all(router.alive() for router in self._routers)

    def tend(self, on_restart: Callable[[], None]) -> None:
        """Start again what ended; the others serve meanwhile."""
        ended = [router for router in self._routers if not router.alive()]
        for router in ended:
            on_restart()
            router.start()
        for router in ended:
            router.wait_listening(RESTART_S)

    def stop(self) -> None:
        """End all; may be called again."""
        for router in self._routers:
            router.stop()

    def _settings_of(self, number: int, port: int) -> RouterSettings:
        own = self._settings
        step = partial(_stepped, by=PORTS_EACH * number)
        name = f"{own.router_id}-{number}" if own.router_id and own.processes > 1 else own.router_id
        return replace(
            own, processes=1, port=port, http_port=step(own.http_port), admin_port=step(own.admin_port), router_id=name
        )


def _stepped(port: int, by: int) -> int:
    """A free port stays one."""
    return port + by if port else 0
