"""One whole fleet on this machine: Redis, router, Ray, supervisor and workers, started together and ended together.

Knows how the parts are wired and in what order; nothing of requests. Invariant: after `stop` no part is left.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from control.cluster import Cluster, Crew
from control.redis_server import RedisServer
from control.router_group import RouterGroup
from control.router_process import Listening, RouterRefused
from control.supervisor import WorkerStatus
from kvstore.redis_url import without_password
from pando.errors import ConfigError
from pando.settings import RouterSettings, UpSettings, WorkerSettings, narrow
from pando.v1 import admin_pb2

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Running:
    """A fleet that serves; addresses are "host:port"."""

    grpc: str
    http: str
    admin: str
    redis: str
    ray: str
    workers: tuple[WorkerStatus, ...]

    def to_json(self) -> dict[str, object]:
        """As `pando up --json` prints it."""
        workers = [{"id": w.worker_id, "epoch": w.epoch, "pid": w.pid, "grpc": w.address} for w in self.workers]
        head = {name: getattr(self, name) for name in ("grpc", "http", "admin", "redis", "ray")}
        return head | {"workers": workers}


class Stack:
    """The parts of one fleet. `start` and `tend` belong on the main thread."""

    def __init__(self, settings: UpSettings, say: Say, *, cluster: Cluster | None = None) -> None:
        """`settings` passed `control.checks.check`; `say` hears one line of progress at a time; `cluster` is a Ray that
        runs, to use and to leave running."""
        self._settings = narrow(
            UpSettings,
            settings,
            cluster_secret=settings.cluster_secret or secrets.token_hex(32),
            link_token=settings.link_token or secrets.token_hex(32),
        )
        # gRPC's own lines on stderr say in its words, in every process, what we say in ours.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        self._say = say
        self._progress = _Progress(say)
        self._given_cluster = cluster
        self._parts = contextlib.ExitStack()
        self._redis: RedisServer | None = None

    def start(self) -> Running:
        """Start everything and wait until the router sees every worker ready. `ConfigError` leaves nothing running."""
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def tend(self) -> None:
        """Bring back what died: call it every second or so. Workers are the supervisor's to bring back."""
        if self._redis is not None and self._redis.pid is None:
            self._say("Redis ended: starting it again")
            self._redis.start()
        self._router.tend(lambda: self._say("a router ended: starting it again"))
        if self._crew.tend():
            self._say("the supervisor ended: started it and the workers again")
        self._progress.workers(self._crew.workers())

    def stop(self) -> None:
        """End every part, the router first; may be called again."""
        self._parts.close()

    def _start(self) -> Running:
        deadline = time.monotonic() + self._settings.ready_timeout_s
        url = self._start_redis()
        settings = narrow(UpSettings, self._settings, redis=url)
        self._cluster = self._given_cluster or self._new_cluster()
        self._crew = Crew(self._cluster, _worker_settings(settings), settings.workers)
        self._router = RouterGroup(narrow(RouterSettings, settings))
        self._start_router_and_workers()
        listening, *_ = self._router.wait_listening(deadline - time.monotonic())
        workers = self._crew.wait_ready(deadline - time.monotonic(), self._starting)
        self._wait_linked(workers, deadline)
        return _running(listening, without_password(url), self._cluster.address, workers)

    def _start_redis(self) -> str:
        if self._settings.redis:
            return self._settings.redis
        self._say("starting Redis")
        self._redis = RedisServer()
        self._parts.callback(self._redis.stop)
        self._redis.start()
        return self._redis.url

    def _new_cluster(self) -> Cluster:
        settings = self._settings
        return Cluster(
            address=settings.ray,
            namespace=settings.cluster,
            slots=settings.workers,
            dashboard=settings.dashboard == "on",
        )

    def _start_router_and_workers(self) -> None:
        """The router starts while Ray does; ended in the opposite order: router, workers, Ray, Redis."""
        if self._given_cluster is None:
            self._parts.callback(self._cluster.stop)
        self._parts.callback(self._crew.stop)
        self._parts.callback(self._router.stop)
        self._say("starting the router")
        self._router.start()
        if self._given_cluster is None:
            self._say(f"joining Ray at {self._settings.ray}" if self._settings.ray else "starting Ray")
            with self._watching_router():
                self._cluster.start()
            if self._cluster.log_folder:
                self._say(f"Ray runs; what workers log is in {self._cluster.log_folder}")
        self._require_router()
        self._say(f"starting {self._settings.workers} workers with {self._settings.model}")
        self._crew.start()

    def _starting(self, workers: Sequence[WorkerStatus]) -> None:
        self._progress.workers(workers)
        self._require_router()

    @contextlib.contextmanager
    def _watching_router(self) -> Iterator[None]:
        """Within, the end of the router interrupts what the main thread waits for: Ray takes seconds to start."""

        def on_child(_number: int, _frame: object) -> None:
            if not self._router.alive():
                raise _RouterEnded

        before = signal.signal(signal.SIGCHLD, on_child)
        try:
            self._require_router()
            yield
        except _RouterEnded:
            self._require_router()
        finally:
            signal.signal(signal.SIGCHLD, before)

    def _require_router(self) -> None:
        """A router that has ended said why: there is nothing to wait for."""
        if not self._router.alive():
            raise RouterRefused("the router could not start")

    def _wait_linked(self, workers: Sequence[WorkerStatus], deadline: float) -> None:
        wanted = {(worker.worker_id, worker.epoch) for worker in workers}
        while True:
            self._require_router()
            seen = self._router.workers()
            for worker in seen:
                if worker.state == admin_pb2.WORKER_STATE_REFUSED:
                    raise ConfigError(f"the router refuses {worker.id}: {worker.reason}")
            if wanted <= {(w.id, w.epoch) for w in seen if w.state == admin_pb2.WORKER_STATE_READY}:
                return
            if time.monotonic() > deadline:
                raise ConfigError("the router did not reach every worker in time")
            time.sleep(0.05)


class _RouterEnded(BaseException):
    """Not an `Exception`: Ray would catch that and go on."""


class _Progress:
    """Says a worker's state when it has changed."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._seen: dict[str, str] = {}

    def workers(self, workers: Sequence[WorkerStatus]) -> None:
        for worker in workers:
            if self._seen.get(worker.worker_id) != worker.state:
                self._seen[worker.worker_id] = worker.state
                self._say(f"{worker.worker_id}: {worker.state}{': ' if worker.reason else ''}{worker.reason}")


def _worker_settings(settings: UpSettings) -> WorkerSettings:
    """Whatever the router does, workers in a local Ray listen on loopback, in a joined one on their node's address."""
    return narrow(WorkerSettings, settings, host="0.0.0.0" if settings.ray else "127.0.0.1")


def _running(listening: Listening, redis: str, ray: str, workers: Sequence[WorkerStatus]) -> Running:
    return Running(listening.grpc, listening.http, listening.admin, redis, ray, tuple(workers))
