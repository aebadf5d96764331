"""Ray as the fleet's control plane: a private local Ray or one that is joined, and the crew of workers in it.

Knows actors and resources, nothing of requests. Invariant: a Ray started here ends with this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._raylet import Config  # type: ignore[attr-defined]
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from control.actors import SupervisorActor
from control.children import Sweeper, source_path
from control.supervisor import Patience, WorkerStatus
from pando.errors import ConfigError, Unavailable
from pando.settings import WorkerSettings, narrow

log = logging.getLogger(__name__)

_NOT_IN_TIME = "timed out during startup"
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
_CALL_TIMEOUT_S = 30.0


class Cluster:
    """A connection to Ray. One a process, as Ray has it."""

    def __init__(self, *, address: str = "", namespace: str = "pando", slots: int = 1, dashboard: bool = False) -> None:
        """`address`: Ray to join, empty for one of our own with logical CPUs for `slots` workers and a supervisor."""
        self._join = address
        self._namespace = namespace
        self._slots = slots
        self._dashboard = dashboard
        self._sweeper: Sweeper | None = None
        self.address = address
        self.local = not address

    @property
    def log_folder(self) -> Path | None:
        """Where a Ray of our own writes what actors print, until it ends."""
        return self._sweeper.folder / "session_latest" / "logs" if self._sweeper else None

    def start(self) -> None:
        """Start or join Ray; raises `ConfigError` when the address does not answer. Call from the main thread."""
        with _own_sigterm():
            context = self._start_local() if self.local else self._start_joined()
        self.address = context.address_info["gcs_address"]

    def stop(self) -> None:
        """Leave Ray; one of our own ends, its folder with it. May be called again."""
        ray.shutdown()
        if self._sweeper is not None:
            self._sweeper.sweep()
        self._sweeper = None

    def worker_options(self, settings: WorkerSettings, count: int) -> dict[str, Any]:
        """Resources of a worker actor: a GPU each where there are GPUs, else CPUs so that `count` workers fit."""
        total = _resources()
        gpus = int(total.get("GPU", 0))
        options: dict[str, Any] = {} if self.local else {"scheduling_strategy": "SPREAD"}
        if settings.runner == "model" and settings.device != "cpu" and gpus:
            if gpus < count:
                raise ConfigError(
                    f"{count} workers need {count} GPUs and there are {gpus}: fewer --workers or --device cpu"
                )
            return options | {"num_gpus": 1, "num_cpus": 0}
        if not self.local:
            return options | {"num_cpus": 1}
        share = total.get("CPU", 1.0) / (count + 1)
        return options | {"num_cpus": max(0.01, min(1.0, int(share * 100) / 100))}

    def supervisor_options(self, worker_options: dict[str, Any]) -> dict[str, Any]:
        """The supervisor takes no CPU that a worker needs; in a joined Ray it stays on the node of its command."""
        if self.local:
            return {"num_cpus": worker_options.get("num_cpus", 0)}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return {"num_cpus": 0, "scheduling_strategy": here}

    def share_host(self, settings: WorkerSettings, count: int) -> WorkerSettings:
        """Settings of workers that share hosts without GPUs: each takes its part of the cores and of the memory."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = max(1, len(alive))
        per_node = -(-count // nodes)
        cores = len(os.sched_getaffinity(0)) if self.local else int(_resources().get("CPU", 1)) // nodes
        return narrow(
            WorkerSettings,
            settings,
            threads=settings.threads or max(1, cores // per_node),
            memory_fraction=settings.memory_fraction / per_node,
        )

    def _start_local(self) -> Any:
        os.environ.update(_local_environment())
        Config.initialize("")  # Ray read its settings when it was imported; it knows no public way to read them again
        try:
            return self._init_local()
        except Exception as error:  # Ray has no type for it
            if _NOT_IN_TIME not in str(error):
                raise
        log.warning("Ray did not come up in its time and is started once more")
        self.stop()
        return self._init_local()

    def _init_local(self) -> Any:
        short = "/tmp" if len(tempfile.gettempdir()) > 40 else None  # Ray's unix sockets lie below it
        self._sweeper = Sweeper("pando-ray-", short)
        with _on_loopback():
            return ray.init(
                num_cpus=self._slots + 1,
                namespace=self._namespace,
                include_dashboard=self._dashboard,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._sweeper.folder),
            )

    def _start_joined(self) -> Any:
        _check_answers(self._join)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        has_token = "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ
        os.environ.setdefault("RAY_AUTH_MODE", "token" if has_token else "disabled")
        Config.initialize("")
        try:
            return ray.init(
                address=self._join, namespace=self._namespace, log_to_driver=False, logging_level=logging.ERROR
            )
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise ConfigError(f"no Ray answers at {self._join}") from error


class Crew:
    """The workers of one fleet, kept by a supervisor actor."""

    def __init__(
        self, cluster: Cluster, settings: WorkerSettings, count: int, *, patience: Patience | None = None
    ) -> None:
        """`settings` are those of every worker; the ids are worker-0 to worker-(count - 1)."""
        self._cluster = cluster
        self._settings = settings
        self._count = count
        self._patience = patience or Patience()
        self._supervisor: Any = None

    def start(self) -> None:
        """Start the supervisor, which starts the workers; returns before they serve."""
        options = self._cluster.worker_options(self._settings, self._count)
        settings = self._settings
        if "num_gpus" not in options:
            settings = self._cluster.share_host(settings, self._count)
        try:
            self._supervisor = (
                ray.remote(SupervisorActor)
                .options(
                    name="supervisor",
                    namespace=settings.cluster,
                    max_restarts=0,
                    **self._cluster.supervisor_options(options),
                )
                .remote(settings, self._count, options, self._patience)
            )
        except ValueError as error:
            raise ConfigError("this Ray has a supervisor of that --cluster name already") from error
        self._call("start")

    def workers(self) -> list[WorkerStatus]:
        """Every wanted worker as it is now; raises `Unavailable` when the supervisor is gone."""
        found: list[WorkerStatus] = self._call("workers")
        return found

    def wait_ready(self, timeout_s: float, say: Callable[[Sequence[WorkerStatus]], None]) -> list[WorkerStatus]:
        """Until every worker serves; `say` hears the states now and then. Raises `ConfigError` when one refuses."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.workers()
            for worker in found:
                if worker.state == "refused":
                    raise ConfigError(f"{worker.worker_id} cannot start: {worker.reason}")
            say(found)
            if all(worker.state == "ready" for worker in found):
                return found
            if time.monotonic() > deadline:
                raise ConfigError(f"the workers were not ready after {timeout_s:g} s")
            time.sleep(0.1)

    def tend(self) -> bool:
        """Start the supervisor again if it is gone, and with it the workers, which ended with it; tells if it was."""
        try:
            self.workers()
        except Unavailable:
            self.stop()
            self.start()
            return True
        return False

    def stop(self) -> None:
        """End the workers and their supervisor; may be called again."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):  # it may be gone, and its workers with it
            ray.get(supervisor.stop.remote(), timeout=_CALL_TIMEOUT_S)
        ray.kill(supervisor, no_restart=True)

    def _call(self, method: str) -> Any:
        try:
            return ray.get(getattr(self._supervisor, method).remote(), timeout=_CALL_TIMEOUT_S)
        except RayError as error:
            raise Unavailable("the supervisor of the workers is gone") from error


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Within, Ray starts; a SIGTERM that comes meanwhile reaches the handler there was before, maybe a little later.

    Ray sets one of its own, then one in C++ that aborts, whichever thread the signal finds. So it waits, in this thread
    and in those that begin here, but for the moments in which a process begins, which must not inherit that.
    """
    handler, mask = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    popen = services.ConsolePopen

    def let_come() -> None:
        ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # since another signal came
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def popen_unheld(*arguments: Any, **keywords: Any) -> Any:
        try:
            let_come()
            return popen(*arguments, **keywords)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    services.ConsolePopen = popen_unheld  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = popen  # type: ignore[misc]
        let_come()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Within, a Ray that starts listens on loopback alone, as it does on systems where it supports no clusters.

    It has no setting for that: a `_node_ip_address` on loopback it turns into the machine's, then listens everywhere.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # read when Ray was imported; its processes read the variable
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _resources() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()
    return found


def _check_answers(address: str, timeout_s: float = 3.0) -> None:
    """Ray itself would wait for minutes. Addresses that Ray finds out by itself, such as "auto", are left to it."""
    host, found, port = address.rpartition(":")
    if not found or "/" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"no Ray answers at {address}") from error


def _local_environment() -> dict[str, str]:
    """What a Ray of our own and every actor in it inherit: no reports, a token only this process knows, our sources."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),  # Ray keeps the first it reads
        "PYTHONPATH": source_path(),
    }
