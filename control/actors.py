"""The two kinds of Ray actor: a worker around `worker.process.WorkerProcess`, and the supervisor of all workers.

Knows Ray and nothing of requests: no call here is on a request's path. The supervisor's process imports no torch.
"""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from control.supervisor import Life, LifeEnded, Patience, Ready, Refusal, Supervisor, WorkerStatus
from pando.errors import ConfigError
from pando.settings import WorkerSettings, narrow

# The supervisor restarts, so that each life takes a new epoch; one thread waits for the end while others answer.
_LIFE = {"max_restarts": 0, "max_concurrency": 8}
# Hosts that stand for "the address of the node I run on": only the actor knows it.
_ANY_HOST = frozenset({"0.0.0.0", "::"})


class WorkerActor:
    """One life of a worker. Ray reads `repr` when the constructor is done, hence the worker starts there."""

    def __init__(self, settings: WorkerSettings) -> None:
        from worker.process import WorkerProcess  # imports torch; the supervisor imports this module and must not

        if settings.host in _ANY_HOST:
            settings = narrow(WorkerSettings, settings, host=ray.util.get_node_ip_address())
        self._settings = settings
        self._state: Ready | Refusal = Refusal("it has not started")
        self._process = WorkerProcess(settings)
        self._state = self._start()

    def __repr__(self) -> str:
        number = self._settings.worker_id.removeprefix("worker-")
        life = f"epoch {self._state.epoch}" if isinstance(self._state, Ready) else "refused"
        return f"Worker({number}, {PurePath(self._settings.model).name}, {life})"

    def ready(self) -> Ready | Refusal:
        """How it serves, or why it does not."""
        return self._state

    def over(self) -> str:
        """Why, when the worker stopped by itself: its engine broke, or a newer life fenced it off."""
        self._process.wait()
        return self._process.failure or "it was stopped"

    def ping(self) -> None:
        """Answers while the process does."""

    def stop(self) -> None:
        """End well: the lease is given back."""
        self._process.stop()

    def _start(self) -> Ready | Refusal:
        try:
            ready = self._process.start()
        except ConfigError as error:
            return Refusal(error.message)
        return Ready(ready.worker_id, ready.epoch, ready.pid, ready.address)


class SupervisorActor:
    """The supervisor inside Ray: an asyncio actor whose workers end with it."""

    def __init__(self, settings: WorkerSettings, count: int, options: dict[str, Any], patience: Patience) -> None:
        """`options`: resources and placement of a worker actor. Worker ids are worker-0, worker-1 and so on."""
        self._settings = settings
        self._options = options
        self._supervisor = Supervisor([f"worker-{i}" for i in range(count)], self._launch, patience=patience)

    def __repr__(self) -> str:
        return f"Supervisor({len(self._supervisor.workers())} workers of {self._settings.cluster})"

    async def start(self) -> None:
        """Begin to keep the workers; returns at once."""
        self._supervisor.start()

    async def workers(self) -> list[WorkerStatus]:
        """Every wanted worker as it is now."""
        return self._supervisor.workers()

    async def pid(self) -> int:
        """Its process id."""
        return os.getpid()

    async def stop(self) -> None:
        """End every worker."""
        await self._supervisor.stop()

    def _launch(self, worker_id: str) -> Life:
        settings = narrow(WorkerSettings, self._settings, worker_id=worker_id)
        if settings.worker_metrics_port:  # workers may share a host: each has a port of its own
            number = int(worker_id.rpartition("-")[2])
            settings = narrow(WorkerSettings, settings, worker_metrics_port=settings.worker_metrics_port + number)
        return _RayLife(settings, self._options).as_life()


class _RayLife:
    """A worker actor as a `Life`: Ray's errors become `LifeEnded`."""

    def __init__(self, settings: WorkerSettings, options: dict[str, Any]) -> None:
        self._settings = settings
        self._options = options
        self._actor: Any = None

    def as_life(self) -> Life:
        return Life(ready=self._ready, over=self._over, ping=self._ping, stop=self._stop, end=self._end)

    async def _ready(self) -> Ready | Refusal:
        try:
            self._actor = (
                ray.remote(WorkerActor)
                .options(name=self._settings.worker_id, namespace=self._settings.cluster, **_LIFE, **self._options)
                .remote(self._settings)
            )
        except ValueError:  # the name of the life before is not free yet
            raise LifeEnded("its name is still taken") from None
        found: Ready | Refusal = await self._call("ready")
        return found

    async def _over(self) -> str:
        reason: str = await self._call("over")
        return reason

    async def _ping(self) -> None:
        await self._call("ping")

    async def _stop(self) -> None:
        await self._call("stop")

    def _end(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)

    async def _call(self, method: str) -> Any:
        if self._actor is None:
            raise LifeEnded("it was not started")
        try:
            return await getattr(self._actor, method).remote()
        except (RayActorError, RayTaskError) as error:
            raise LifeEnded(_last_line(error)) from None


def _last_line(error: Exception) -> str:
    """Ray's messages carry a traceback of many lines; the last says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
