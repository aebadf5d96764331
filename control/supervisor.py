"""Wanted against live workers: starts each, watches it, starts it again under the same name when it ends or hangs.

Knows no Ray: a life of a worker is given to it as awaitables. Invariant: at most one life of a worker id at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a worker says of itself once it serves."""

    worker_id: str
    epoch: int
    pid: int
    address: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker's settings or surroundings are such that it cannot start; `reason` is one line for the operator."""

    reason: str


@dataclass(frozen=True, slots=True)
class Life:
    """One life of a worker as its supervisor sees it. The awaitables raise `LifeEnded` when its process is gone.

    ready: how it serves, or why it refuses to start. over: why, when the worker stopped by itself. ping: returns
    while the process answers. stop: asks it to end well. end: kills it; harmless on one that is dead.
    """

    ready: Callable[[], Awaitable[Ready | Refusal]]
    over: Callable[[], Awaitable[str]]
    ping: Callable[[], Awaitable[None]]
    stop: Callable[[], Awaitable[None]]
    end: Callable[[], None]


class LifeEnded(Exception):
    """The worker's process is gone."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A wanted worker: state is starting, ready, waiting (for its next start), refused or stopped."""

    worker_id: str
    state: str = "starting"
    epoch: int = 0
    pid: int = 0
    address: str = ""
    restarts: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds.

    A worker that served for `steady_s` is started again at once; one that did not waits `backoff_s`, doubled with each
    such life up to `backoff_max_s`. One that never served is given up after `first_starts` tries.
    """

    ping_every_s: float = 2.0
    ping_timeout_s: float = 10.0
    steady_s: float = 5.0
    backoff_s: float = 0.25
    backoff_max_s: float = 10.0
    first_starts: int = 3
    stop_s: float = 3.0


class Supervisor:
    """Keeps the wanted workers alive from `start` to `stop`; lives on one event loop."""

    def __init__(
        self, worker_ids: Sequence[str], launch: Callable[[str], Life], *, patience: Patience | None = None
    ) -> None:
        self._launch = launch
        self._patience = patience or Patience()
        self._status = {worker_id: WorkerStatus(worker_id) for worker_id in worker_ids}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._lives: dict[str, Life] = {}
        self._stopping = False

    def start(self) -> None:
        """Begin to keep every worker."""
        for worker_id in self._status:
            self._keepers[worker_id] = asyncio.create_task(self._keep(worker_id), name=f"keep {worker_id}")

    async def stop(self) -> None:
        """Ask every worker to end, then see to it."""
        self._stopping = True
        await asyncio.gather(*(self._ask_to_stop(life) for life in self._lives.values()))
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        for worker_id in self._status:
            self._set(worker_id, state="stopped")

    def workers(self) -> list[WorkerStatus]:
        """Every wanted worker, in the order given."""
        return list(self._status.values())

    async def _ask_to_stop(self, life: Life) -> None:
        with contextlib.suppress(LifeEnded, TimeoutError):
            await asyncio.wait_for(life.stop(), self._patience.stop_s)

    async def _keep(self, worker_id: str) -> None:
        """One worker, life after life."""
        short_lives = 0
        served_once = False
        while not self._stopping:
            self._set(worker_id, state="starting", reason="")
            served_s, end = await self._live(worker_id)
            served_once = served_once or served_s > 0
            short_lives = 0 if served_s >= self._patience.steady_s else short_lives + 1
            reason = end.reason if isinstance(end, Refusal) else str(end)
            if not served_once and (isinstance(end, Refusal) or short_lives >= self._patience.first_starts):
                self._set(worker_id, state="refused", reason=reason)
                return
            log.warning("worker %s ended after %.1f s of service: %s", worker_id, served_s, reason)
            self._set(worker_id, state="waiting", reason=reason, restarts=self._status[worker_id].restarts + 1)
            await asyncio.sleep(self._delay(short_lives))

    async def _live(self, worker_id: str) -> tuple[float, Refusal | LifeEnded]:
        """One life: the seconds it served, and why it ended or never began."""
        clock = asyncio.get_running_loop().time
        served_from: float | None = None
        life = self._lives[worker_id] = self._launch(worker_id)
        try:
            ready = await life.ready()
            if isinstance(ready, Refusal):
                return 0.0, ready
            served_from = clock()
            self._set(worker_id, state="ready", epoch=ready.epoch, pid=ready.pid, address=ready.address)
            raise LifeEnded(await self._watch(life))
        except LifeEnded as end:
            return (0.0 if served_from is None else clock() - served_from), end
        finally:
            del self._lives[worker_id]
            life.end()

    async def _watch(self, life: Life) -> str:
        """Until the worker stops by itself, and why. Raises `LifeEnded` on one that hangs."""
        over = asyncio.ensure_future(life.over())
        try:
            while not (await asyncio.wait([over], timeout=self._patience.ping_every_s))[0]:
                try:
                    await asyncio.wait_for(life.ping(), self._patience.ping_timeout_s)
                except TimeoutError:
                    raise LifeEnded(f"no answer for {self._patience.ping_timeout_s:g} s") from None
            return over.result()
        finally:
            over.cancel()

    def _delay(self, short_lives: int) -> float:
        if short_lives == 0:
            return 0.0
        return min(self._patience.backoff_s * 2.0 ** (short_lives - 1), self._patience.backoff_max_s)

    def _set(self, worker_id: str, **changes: object) -> None:
        self._status[worker_id] = replace(self._status[worker_id], **changes)  # type: ignore[arg-type]
