"""One router process: its parts put together, started in order and stopped in reverse.

Knows every part by its face only. Invariant: `start` either serves on all ports or raises one `ConfigError` and leaves
nothing running.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.redis_url import described
from kvstore.scope import TenantId
from kvstore.task_end import end
from pando.errors import ConfigError
from pando.model_folder import resolve_model
from pando.settings import RouterSettings
from pando.v1.inference_pb2 import GenerateRequest
from router.admin_api import RouterView
from router.admission import Admission
from router.auth import Authenticator, check_admin_key, open_authenticator
from router.fleet import Fleet, FleetModel
from router.generation import Generation
from router.grpc_api import InferenceService
from router.health import HealthService
from router.http_api import HttpServer
from router.interceptors import GateLimits
from router.limit_store import LimitStore
from router.limits import LEASE_TTL_S, TIMEOUT_S, FleetLimits
from router.metrics import Metrics
from router.model_card import ModelCard, read_model_card
from router.peers import PeerExchange
from router.placement import Placement, Policy
from router.prefix_catalog import PrefixCatalog
from router.prefix_registry import PrefixRegistry
from router.prefix_seal import PrefixSeal
from router.prefixes_api import PrefixesService
from router.self_check import SelfCheck
from router.server import (
    INFERENCE,
    PREFIXES,
    PublicServices,
    ServerOptions,
    address,
    admin_server,
    check_free,
    listen,
    public_server,
)
from router.sharing import PrefixSharing
from router.tenants import Tenant
from router.tokenizer import Tokenizer
from router.validation import check_request
from router.worker_link import WorkerLink

GRACE_S = 5.0
REDIS_START_S = 2.0
SECRET_TTL_MS = 3000
SECRET_EVERY_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where a router listens, each "host:port"."""

    router: str
    grpc: str
    http: str
    admin: str


class RouterProcess:
    """Everything of one router, for one event loop."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._router_id = settings.router_id or f"router-{secrets.token_hex(4)}"
        self._parts = AsyncExitStack()
        self._started = time.monotonic()

    async def start(self) -> Listening:
        """Serve; returns once every port is open, whether or not a worker is there yet."""
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Let running calls end for a few seconds, then close everything. Idempotent."""
        await self._parts.aclose()

    async def run(self, on_ready: Callable[[Listening], None]) -> None:
        """Serve until SIGINT or SIGTERM."""
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        on_ready(await self.start())
        await ended.wait()
        await self.stop()

    async def _start(self) -> Listening:
        settings = self._settings
        authenticator = open_authenticator(settings.tenants, settings.host)
        check_admin_key(settings.admin_key, settings.host)
        shared_port = settings.reuse_port == "on"
        check_free(settings.host, settings.port, shared=shared_port)
        for port in (settings.http_port, settings.admin_port):
            check_free(settings.host, port)
        secret = await self._agree_on_secret()
        folder, card = await asyncio.to_thread(self._read_card)
        index, mirror, fleet = await self._follow_fleet()

        def served() -> ModelCard:
            return served_card(card, fleet.model_spec)

        tokenizer = await asyncio.to_thread(self._load_tokenizer, folder, served)
        self._parts.callback(tokenizer.close)
        metrics = Metrics(authenticator.known(), most_tenants=settings.tenant_metrics)
        admission = Admission(settings.max_in_flight, await self._share_limits(secret))
        sharing = await self._share_prefixes(fleet, authenticator, secret, card.name)
        generation = Generation(sharing.dispatch, tokenizer, admission, metrics)
        inference = InferenceService(generation, tokenizer, served, block_size=settings.block_size)
        copies = sharing.pinning.num_copies
        prefixes = PrefixesService(
            sharing.publishing, tokenizer, admission, served, copies, block_size=settings.block_size
        )
        view = RouterView(
            router_id=self._router_id,
            metrics=metrics,
            admission=admission,
            workers=fleet.workers,
            indexed_blocks=lambda: len(index),
            index_connected=lambda: mirror.connected,
            uptime_s=lambda: time.monotonic() - self._started,
            purge=sharing.purging.purge,
            recent=sharing.dispatch.recent.of,
            explain=partial(_explain, generation, authenticator, served),
        )
        _add_gauges(metrics, view)
        metrics.gauge(
            "planted_unfound",
            "Workers whose planted prefix this router cannot find",
            lambda: self._self_check.num_unfound,
        )
        metrics.gauge("index_mismatches", "Digests that differed from the mirror's", lambda: mirror.counts.mismatches)
        metrics.gauge("published_prefixes", "Published prefixes", lambda: len(sharing.catalog))
        metrics.gauge("reserved", "Answers that hold a place at a worker", lambda: fleet.num_reserved)
        health = HealthService(lambda: fleet.ready, (INFERENCE, PREFIXES))
        options = ServerOptions(
            GateLimits(settings.max_request_s), settings.max_message_bytes, settings.reflection == "on", shared_port
        )
        http = await self._serve_http(metrics, lambda: fleet.ready)
        admin = await self._serve(admin_server(view, settings.admin_key, options), settings.admin_port)
        public = public_server(PublicServices(inference, prefixes, health), authenticator, metrics, options)
        grpc_address = await self._serve(public, settings.port, shared=shared_port)
        self._parts.callback(health.stop)
        return Listening(self._router_id, grpc_address, http, admin)

    def _read_card(self) -> tuple[Path, ModelCard]:
        folder = resolve_model(self._settings.model)
        card = read_model_card(self._settings.model, folder)
        for field in card.ignored:
            log.warning("generation_config.json sets %s, which this version does not apply", field)
        return folder, card

    def _load_tokenizer(self, folder: Path, served: Callable[[], ModelCard]) -> Tokenizer:
        threads = self._settings.tokenizer_threads
        return Tokenizer(folder, threads=threads, max_tokens=lambda: served().context_length)

    async def _follow_fleet(self) -> tuple[MemoryIndex, Mirror, Fleet]:
        settings = self._settings
        index = MemoryIndex()
        mirror = Mirror(settings.redis_url, settings.cluster, index)
        fleet = Fleet(
            mirror,
            index,
            router=self._router_id,
            model=settings.model,
            block_size=settings.block_size,
            policy=cast(Policy, settings.placement),
            link_type=partial(WorkerLink, token=settings.link_token, following=mirror.following),
        )
        mirror.following.on_read = self._self_check = SelfCheck(index, settings.block_size)
        await mirror.start()
        self._parts.push_async_callback(mirror.stop)
        await fleet.start()
        self._parts.push_async_callback(fleet.stop)
        await self._exchange_loads(fleet)
        return index, mirror, fleet

    async def _exchange_loads(self, fleet: Fleet) -> None:
        settings = self._settings
        client = _redis_client(settings.redis, timeout_s=TIMEOUT_S)
        self._parts.push_async_callback(client.aclose)
        exchange = PeerExchange(
            client, settings.cluster, router=self._router_id, own=fleet.sent, loads=fleet.peers, clock=time.monotonic
        )
        self._parts.push_async_callback(exchange.stop)
        await exchange.start()

    async def _share_prefixes(
        self, fleet: Fleet, authenticator: Authenticator, secret: bytes, model: str
    ) -> PrefixSharing:
        settings = self._settings
        client, seal = _redis_client(settings.redis_url), PrefixSeal(secret, settings.cluster)
        registry = PrefixRegistry(client, settings.cluster, seal, PrefixCatalog(), model=model)
        sharing = PrefixSharing(
            fleet, authenticator, registry, secret=secret, model=model, block_size=settings.block_size
        )
        self._parts.push_async_callback(sharing.stop)
        await sharing.start()
        return sharing

    async def _share_limits(self, secret: bytes) -> FleetLimits:
        settings = self._settings
        client = _redis_client(settings.redis_url, timeout_s=TIMEOUT_S)
        self._parts.push_async_callback(client.aclose)
        store = LimitStore(client, settings.cluster, secret, router=self._router_id, ttl_s=LEASE_TTL_S)
        limits = FleetLimits(store, clock=time.monotonic)
        self._parts.push_async_callback(limits.stop)
        await limits.start()
        return limits

    async def _serve(self, server: grpc.aio.Server, port: int, *, shared: bool = False) -> str:
        where = listen(server, self._settings.host, port, shared=shared)
        await server.start()
        self._parts.push_async_callback(server.stop, GRACE_S)
        return where

    async def _serve_http(self, metrics: Metrics, ready: Callable[[], bool]) -> str:
        http = HttpServer(metrics, ready, admin_key=self._settings.admin_key)
        self._parts.push_async_callback(http.stop)
        port = await http.start(self._settings.host, self._settings.http_port)
        return address(self._settings.host, port)

    async def _agree_on_secret(self) -> bytes:
        """The cluster secret, after Redis was reached and no other router was found to use another one."""
        settings = self._settings
        if not settings.redis:
            raise ConfigError("a router needs --redis URL: it finds its workers there")
        if not settings.cluster_secret:
            log.warning("no cluster secret is set: a random one is used, and no second router can join")
        secret = (settings.cluster_secret or secrets.token_hex(32)).encode()
        claim = SecretClaim(settings.redis_url, settings.cluster, secret)
        self._parts.push_async_callback(claim.stop)
        await claim.start()
        return secret


def served_card(card: ModelCard, spec: FleetModel | None) -> ModelCard:
    """The model's card as the fleet's workers serve it, once one is known.

    How long a sequence may be is theirs to say: a small pool allows less than the model does, a window much more.
    """
    if spec is None:
        return card
    return replace(card, context_length=spec.max_model_len, vocab_size=min(card.vocab_size, spec.vocab_size))


class SecretClaim:
    """A keyed digest of the cluster secret in Redis, kept alive while this router lives: routers must agree on it."""

    def __init__(self, url: str, cluster: str, secret: bytes) -> None:
        self._url = url
        self._key = f"{cluster}:secret-check"
        self._digest = hashlib.blake2b(b"check", key=hashlib.sha256(secret).digest(), person=b"pando.secret").digest()
        self._client = _redis_client(url)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raise `ConfigError` if Redis cannot be reached, or a live router has another secret."""
        began = time.monotonic()
        while not await self._claim_within(time.monotonic() - began):
            await asyncio.sleep(0.2)
        self._task = asyncio.create_task(self._keep(), name="cluster-secret")

    async def stop(self) -> None:
        """Stop renewing. Other routers' claims stay."""
        if self._task is not None:
            await end(self._task)
        await self._client.aclose()

    async def _claim_within(self, waited_s: float) -> bool:
        """Try once; raises when it has failed for too long. What a dead router left is gone after its time to live."""
        try:
            agreed = await self._claim()
        except redis.RedisError as error:
            if waited_s > REDIS_START_S:
                raise ConfigError(described(error, self._url)) from error
            return False
        if not agreed and waited_s > SECRET_TTL_MS / 1000 + 0.5:
            raise ConfigError("another router of this cluster has another cluster secret: set PANDO_CLUSTER_SECRET")
        return agreed

    async def _claim(self) -> bool:
        if await self._client.set(self._key, self._digest, nx=True, px=SECRET_TTL_MS):
            return True
        if await self._client.get(self._key) != self._digest:
            return False
        await self._client.pexpire(self._key, SECRET_TTL_MS)
        return True

    async def _keep(self) -> None:
        agreed = True
        while True:
            await asyncio.sleep(SECRET_EVERY_S)
            try:
                now_agreed = await self._claim()
            except redis.RedisError:
                continue
            if agreed and not now_agreed:
                log.error("another router of this cluster has another cluster secret: they share no cached prefix")
            agreed = now_agreed


def _redis_client(url: str, *, timeout_s: float = 1.0) -> redis.asyncio.Redis:
    try:
        return redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise ConfigError(described(error, url)) from error


async def _explain(
    generation: Generation,
    authenticator: Authenticator,
    card: Callable[[], ModelCard],
    tenant: TenantId,
    request: GenerateRequest,
) -> Placement:
    """Where a tenant's call would go, whether or not the tenant has a record."""
    known = authenticator.lookup(tenant) or Tenant(tenant)
    return await generation.explain(known, check_request(request, card()), card())


def _add_gauges(metrics: Metrics, view: RouterView) -> None:
    metrics.gauge("in_flight", "Requests in flight", lambda: view.admission.in_flight)
    metrics.gauge("indexed_blocks", "Blocks in the prefix index", view.indexed_blocks)
    metrics.gauge("index_connected", "1 while the index is fed by Redis", view.index_connected)
    metrics.gauge("workers", "Workers with a lease", lambda: len(view.workers()))
