"""A real fleet without Ray for benchmarks: Redis, workers with the simulated runner and routers, each a process.

Knows command lines and ports, no workload. Invariant: when the block ends, everything it started has ended.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from control.children import Child, source_path
from control.redis_server import RedisServer
from control.router_process import RouterProcess
from pando.errors import ConfigError
from pando.settings import ENV_PREFIX, RouterSettings, WorkerSettings, narrow, to_flags
from pando.v1 import admin_pb2
from router.auth import key_hash

READY_TIMEOUT_S = 60.0
SECRET = "of a benchmark's fleet"


@dataclass(frozen=True, slots=True)
class ProcessFleet:
    """`targets`: the gRPC address of each router."""

    targets: tuple[str, ...]


def key_of(tenant: str) -> str:
    """The API key of a tenant of such a fleet."""
    return f"key of {tenant}"


@contextmanager
def process_fleet(
    worker: WorkerSettings, workers: int, router: RouterSettings, routers: int, weights: Mapping[str, int] | None = None
) -> Iterator[ProcessFleet]:
    """All of it, ready. With `weights` there are these tenants, each with its key; without, any on loopback.

    Call from the main thread. Raises `ConfigError` where something does not start.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    with ExitStack() as parts:
        redis = RedisServer()
        parts.callback(redis.stop)
        redis.start()
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="pando-bench-")))
        children = [_start_worker(worker, f"w{number}", redis.url, parts) for number in range(workers)]
        asked = narrow(
            RouterSettings,
            router,
            redis=redis.url,
            cluster_secret=SECRET,
            tenants=_write_tenants(folder, weights) if weights else "",
        )
        started = [_start_router(asked, number, parts) for number in range(routers)]
        targets = tuple(one.wait_listening(deadline - time.monotonic()).grpc for one in started)
        for child in children:
            _wait_line(child, deadline)
        for one in started:
            _wait_linked(one, workers, deadline)
        yield ProcessFleet(targets)


def _start_worker(settings: WorkerSettings, name: str, redis: str, parts: ExitStack) -> Child:
    own = narrow(WorkerSettings, settings, worker_id=name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    environment |= {"PYTHONPATH": source_path(), f"{ENV_PREFIX}REDIS": redis}
    child = Child(
        [sys.executable, "-P", "-m", "worker", "--json", *to_flags(own)], env=environment, stdout=subprocess.PIPE
    )
    parts.callback(child.stop)
    return child


def _start_router(settings: RouterSettings, number: int, parts: ExitStack) -> RouterProcess:
    own = narrow(RouterSettings, settings, router_id=f"router-{number}", port=0, http_port=0, admin_port=0)
    process = RouterProcess(own)
    parts.callback(process.stop)
    process.start()
    return process


def _wait_line(child: Child, deadline: float) -> None:
    """Until a worker has said that it is ready."""
    if (
        not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
        or not child.stdout.readline()
    ):
        raise ConfigError("a worker did not start")


def _wait_linked(router: RouterProcess, workers: int, deadline: float) -> None:
    ready = admin_pb2.WORKER_STATE_READY
    while sum(worker.state == ready for worker in router.workers()) < workers:
        if time.monotonic() > deadline:
            raise ConfigError("a router did not see all workers ready")
        time.sleep(0.05)


def _write_tenants(folder: Path, weights: Mapping[str, int]) -> str:
    path = folder / "tenants.toml"
    tables = (f'[tenants.{name}]\nkeys = ["{key_hash(key_of(name))}"]\nweight = {weights[name]}\n' for name in weights)
    path.write_text("\n".join(tables), "utf-8")
    return str(path)
