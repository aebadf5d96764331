"""A worker as a whole: runner, pool, scheduler, engine, link server and publisher put together, started and ended.

Knows the order of things and nothing of what they do. Whatever ends it, all threads it started end with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

import redis
from prometheus_client import start_http_server

from kvstore.block_key import key_fingerprint
from kvstore.block_pool import BlockPool
from kvstore.lease import Fenced, Lease, LeaseKeeper, connect, take_epoch
from kvstore.ledger import Ledger
from kvstore.planted import planted_keys
from kvstore.redis_index import RedisIndexWriter
from kvstore.redis_url import why_no_answer
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from worker.admission import SchedulerLimits
from worker.checks import check_settings
from worker.engine import Engine, StepReport
from worker.holdings import Holdings
from worker.link_guard import check_link_token
from worker.metrics import StepMetrics
from worker.offload import Offload
from worker.publisher import Publisher
from worker.runner import ModelSpec, Runner
from worker.scheduler import Scheduler
from worker.server import LinkServer, WorkerIdentity

logger = logging.getLogger(__name__)

T = TypeVar("T")

REDIS_TIMEOUT_S = 0.05
BULK_TIMEOUT_S = 1.0
"""Of the small calls of every step and heartbeat, and of the calls that write a whole snapshot."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker that serves; `address` is "host:port" of its link."""

    worker_id: str
    epoch: int
    pid: int
    address: str


class WorkerProcess:
    """One life of a worker. `start` once; then `wait` returns when it has stopped, by `stop` or by itself."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._over = threading.Event()
        self._stopping = threading.Lock()
        self._loop: _LoopThread | None = None
        self._runner: Runner | None = None
        self._engine: Engine | None = None
        self._server: LinkServer | None = None
        self._publisher: Publisher | None = None
        self._metrics: WSGIServer | None = None
        self._redis: redis.Redis | None = None
        self._bulk: redis.Redis | None = None
        self.failure = ""
        """Why it stopped by itself; empty otherwise."""

    def start(self) -> WorkerReady:
        """Load the model and serve. Raises `ConfigError`, with nothing left running, on what it cannot start with."""
        try:
            return self._start()
        except BaseException:
            self.stop()
            raise

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the worker is over; whether it is. One that broke or was fenced is taken down here."""
        over = self._over.wait(timeout_s)
        if over:
            self.stop()
        return over

    def request_stop(self) -> None:
        """Let `wait` return; for signal handlers."""
        self._over.set()

    def stop(self) -> None:
        """Give the lease back, end what runs, and free the model. Idempotent, from any thread."""
        self._over.set()
        with self._stopping:
            if self._publisher is not None:
                self._publisher.stop()
            if self._engine is not None:
                self._engine.stop()
            if self._loop is not None:
                if self._server is not None:
                    self._loop.call(self._server.stop())
                self._loop.stop()
            if self._metrics is not None:
                self._metrics.shutdown()
                self._metrics.server_close()
            for client in (self._redis, self._bulk):
                if client is not None:
                    client.close()
            if self._runner is not None:
                self._runner.close()
            self._publisher = self._engine = self._loop = self._server = None
            self._metrics = self._redis = self._bulk = self._runner = None

    def _start(self) -> WorkerReady:
        settings = self._settings
        check_settings(settings)
        check_link_token(settings.link_token, settings.host)
        self._bulk = _connect(settings)
        self._runner = load_runner(settings)
        spec = self._runner.spec
        epoch = _take_epoch(self._bulk, settings)
        pool = _pool(settings, spec)
        metrics = StepMetrics(self._on_step, model=spec.name, worker=settings.worker_id)
        offload = _offload(self._runner, pool)
        tiers = offload.tiers if offload is not None else None
        metrics.watch("device", pool)
        if offload is not None:
            metrics.watch("cpu", offload.tiers.cpu)
            metrics.watch_error(offload.mover)
        holdings = Holdings(pool, tiers)
        limits = _limits(settings, spec)
        self._engine = Engine(
            self._runner,
            pool,
            Scheduler(pool, limits, holdings=holdings, tiers=tiers),
            metrics,
            holdings=holdings,
            offload=offload,
            on_broken=self._on_broken,
            overlap=overlaps(settings, self._runner),
        )
        self._loop = _LoopThread()
        identity = _identity(settings, spec, epoch)
        self._server = self._loop.call(_make_server(self._engine, identity, settings.link_token, offload))
        self._engine.start()
        address = self._loop.call(self._server.start(settings.host, settings.worker_port))
        if self._bulk is not None:
            payload_format = offload.mover.payload_format if offload is not None else ""
            lease = _lease(settings, identity, spec, limits, address, payload_format=payload_format)
            self._publisher = self._server.publisher = self._publish(self._bulk, lease, spec)
        if settings.worker_metrics_port:
            self._metrics = _serve_metrics(settings, metrics)
        return WorkerReady(settings.worker_id, epoch, identity.pid, address)

    def _publish(self, bulk: redis.Redis, lease: Lease, spec: ModelSpec) -> Publisher:
        settings = self._settings
        capacity = lease.device_blocks + settings.cpu_blocks
        ledger = Ledger(settings.worker_id, lease.epoch)
        self._redis = client = connect(settings.redis_url, timeout_s=REDIS_TIMEOUT_S)
        publisher = Publisher(
            RedisIndexWriter(client, settings.cluster, ledger, capacity=capacity, bulk=bulk),
            LeaseKeeper(client, settings.cluster, ttl_s=settings.lease_ttl_s),
            lease,
            heartbeat_s=settings.heartbeat_s,
            on_fenced=self._on_fenced,
            planted=planted_keys(spec.fingerprint, spec.block_size),
        )
        try:
            publisher.start()
        except (redis.RedisError, Fenced) as error:
            raise ConfigError(f"cannot register worker {settings.worker_id} in Redis") from error
        return publisher

    def _on_step(self, report: StepReport) -> None:
        server, publisher = self._server, self._publisher
        if server is not None:
            server.deliver(report)
        if publisher is not None:
            publisher.put(report)

    def _on_broken(self) -> None:
        self.failure = "the engine broke; the log has the cause"
        self._over.set()

    def _on_fenced(self) -> None:
        self.failure = "a newer life of this worker has taken its place"
        self._over.set()


class _LoopThread:
    """An asyncio loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop(self) -> None:
        """End what still runs on the loop, then the thread."""
        self.call(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _make_server(engine: Engine, identity: WorkerIdentity, token: str, offload: Offload | None) -> LinkServer:
    return LinkServer(engine, identity, token=token, offload=offload)


def _connect(settings: WorkerSettings) -> redis.Redis | None:
    """A client of a Redis that answers; None where the settings name no Redis."""
    if not settings.redis:
        return None
    timeout_s = min(BULK_TIMEOUT_S, settings.lease_ttl_s / 2)
    if reason := why_no_answer(settings.redis_url, timeout_s):
        raise ConfigError(reason)
    return connect(settings.redis_url, timeout_s=timeout_s)


def _take_epoch(client: redis.Redis | None, settings: WorkerSettings) -> int:
    """Fence older lives of this worker; only when this one can serve."""
    if client is None:
        return 1
    try:
        return take_epoch(client, settings.cluster, settings.worker_id)
    except redis.RedisError as error:
        raise ConfigError(f"cannot take an epoch for worker {settings.worker_id} in Redis") from error


def load_runner(settings: WorkerSettings) -> Runner:
    """Only the runner that is wanted is imported: the simulated one needs no torch."""
    if settings.runner == "simulated":
        from worker.simulated_runner import load_simulated_runner

        return load_simulated_runner(settings)
    from worker.model_runner import load_model_runner

    return load_model_runner(settings)


def _pool(settings: WorkerSettings, spec: ModelSpec) -> BlockPool:
    reuse = settings.prefix_cache == "on"
    return BlockPool(spec.num_blocks, spec.block_size, reuse=reuse, policy=settings.eviction)


def _offload(runner: Runner, pool: BlockPool) -> Offload | None:
    """The CPU tier behind the pool, where the runner has memory for one."""
    if runner.mover is None or not pool.reuse:
        return None
    return Offload(pool, runner.mover)


def overlaps(settings: WorkerSettings, runner: Runner) -> bool:
    """Whether steps are launched early. On the CPU that computes, what is done beside a step is taken from it."""
    return runner.runs_beside if settings.overlap == "auto" else settings.overlap == "on"


def _limits(settings: WorkerSettings, spec: ModelSpec) -> SchedulerLimits:
    return SchedulerLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        max_model_len=spec.max_model_len,
        window=spec.window,
        sinks=spec.sinks,
    )


def _identity(settings: WorkerSettings, spec: ModelSpec, epoch: int) -> WorkerIdentity:
    return WorkerIdentity(
        worker=settings.worker_id,
        epoch=epoch,
        model=spec.name,
        block_size=spec.block_size,
        key_fingerprint=key_fingerprint(spec.fingerprint, spec.block_size),
        max_model_len=spec.max_model_len,
        vocab_size=spec.vocab_size,
        device_blocks=spec.num_blocks,
        pid=os.getpid(),
    )


def _lease(
    settings: WorkerSettings,
    identity: WorkerIdentity,
    spec: ModelSpec,
    limits: SchedulerLimits,
    address: str,
    *,
    payload_format: str,
) -> Lease:
    return Lease(
        worker_id=identity.worker,
        epoch=identity.epoch,
        address=address,
        model=identity.model,
        block_size=identity.block_size,
        key_fingerprint=identity.key_fingerprint,
        model_fingerprint=spec.fingerprint.hex(),
        pid=identity.pid,
        device_blocks=identity.device_blocks,
        max_model_len=identity.max_model_len,
        max_held=limits.num_held(identity.max_model_len, identity.block_size),
        vocab_size=identity.vocab_size,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
        max_batch_tokens=settings.max_batch_tokens,
        reuse=settings.prefix_cache == "on",
        payload_format=payload_format,
    )


def _serve_metrics(settings: WorkerSettings, metrics: StepMetrics) -> WSGIServer:
    """Serve /metrics from a thread of its own."""
    try:
        server, _ = start_http_server(settings.worker_metrics_port, settings.host, metrics.registry)
    except OSError as error:
        raise ConfigError(f"cannot listen on {settings.host}:{settings.worker_metrics_port}") from error
    return server
