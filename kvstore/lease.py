"""Leases: which workers live, in which epoch, and what a router must know of them.

Knows nothing of blocks. Invariant: a worker id has one newest epoch, and only its holder can renew the lease.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.block import WorkerId


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a worker, as it stands in Redis while it is renewed."""

    worker_id: str
    epoch: int
    address: str
    model: str
    block_size: int
    key_fingerprint: str
    model_fingerprint: str
    pid: int
    device_blocks: int
    max_model_len: int
    vocab_size: int
    seq: int = 0
    num_blocks: int = 0
    digest: int = 0
    """Of what is resident after batch `seq`, as `kvstore.events.state_digest` makes it."""
    running: int = 0
    waiting: int = 0
    queued_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    draining: bool = False
    max_sequences: int = 0
    max_waiting: int = 0
    max_batch_tokens: int = 0
    max_held: int = 0
    """Most positions of which one sequence holds KV at a time; a window makes it less than `max_model_len`. 0: all."""
    reuse: bool = True
    """False for a worker that keeps no prefix: nothing it computes may be credited to a later request."""
    payload_format: str = ""
    """Of the KV blocks that it exchanges with others, which must have the same; empty for a worker that does not."""
    life: str = ""
    """Random, set by the keeper: tells two lives apart even where Redis lost the epoch counter and gave one twice."""


class Fenced(RuntimeError):
    """A newer life of this worker exists: this one must stop writing."""


def redis_key(cluster: str, worker_id: str, part: str) -> str:
    """Name of one of a worker's keys; the braces keep all keys of a worker on one node of a Redis Cluster."""
    return f"{cluster}:{{{worker_id}}}:{part}"


def workers_key(cluster: str) -> str:
    """Name of the set of worker ids that ever held a lease."""
    return f"{cluster}:workers"


def connect(redis_url: str, *, timeout_s: float = 1.0) -> redis.Redis:
    """A client for a worker's publisher thread: it waits at most `timeout_s` for Redis and retries nothing.

    It connects on first use. Raises ValueError on a URL that is none.
    """
    return redis.Redis.from_url(
        redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
    )


def take_epoch(client: redis.Redis, cluster: str, worker_id: str) -> int:
    """Begin a new life of a worker: from now on every older one is fenced."""
    return int(client.incr(redis_key(cluster, worker_id, "epoch")))


class LeaseKeeper:
    """Renews the lease of one life of a worker. For one thread.

    Redis errors reach the caller, who tries again at the next beat.
    """

    def __init__(self, client: redis.Redis, cluster: str, *, ttl_s: float = 2.0) -> None:
        self._cluster = cluster
        self._life = secrets.token_hex(8)
        self._ttl_ms = max(1, math.ceil(ttl_s * 1000))
        self._renew = client.register_script(_RENEW)
        self._release = client.register_script(_RELEASE)

    def renew(self, lease: Lease) -> None:
        """Write the lease for another TTL. Raises `Fenced` if the worker has a newer epoch."""
        raw = msgspec.json.encode(msgspec.structs.replace(lease, life=self._life))
        newest = self._renew(
            keys=self._keys(lease.worker_id),
            args=[lease.epoch, raw, self._ttl_ms, lease.worker_id, workers_key(self._cluster)],
        )
        check_fence(lease.worker_id, lease.epoch, newest)

    def release(self, worker_id: str, epoch: int) -> None:
        """End the lease now; nothing happens if it is a newer life's."""
        self._release(keys=self._keys(worker_id), args=[epoch])

    def _keys(self, worker_id: str) -> list[str]:
        return [redis_key(self._cluster, worker_id, part) for part in ("epoch", "lease")]


def check_fence(worker_id: str, epoch: int, newest: object) -> None:
    """Raise `Fenced` if `newest`, the epoch that a script returned, is newer than ours."""
    if int(newest) > epoch:  # type: ignore[call-overload]
        raise Fenced(f"worker {worker_id} has a newer life, epoch {newest}; this one is epoch {epoch}")


class LeaseView(msgspec.Struct, frozen=True):
    """One look at the leases: `known` are all ids of the set, `malformed` counts entries that could not be read."""

    leases: dict[WorkerId, Lease]
    known: frozenset[WorkerId]
    malformed: int = 0


async def view_leases(client: redis.asyncio.Redis, cluster: str) -> LeaseView:
    """All live leases by worker id, in two round trips whatever the number of workers."""
    members = await client.smembers(workers_key(cluster))
    names = sorted(_text(member) for member in members)
    if not names:
        return LeaseView({}, frozenset())
    values: list[Any] = await client.mget([redis_key(cluster, name, "lease") for name in names])
    leases, malformed = _decode(zip(names, values, strict=True))
    return LeaseView(leases, frozenset(WorkerId(name) for name in names), malformed)


def _decode(entries: Iterable[tuple[str, bytes | None]]) -> tuple[dict[WorkerId, Lease], int]:
    """The leases that can be read, and how many could not."""
    leases: dict[WorkerId, Lease] = {}
    malformed = 0
    for name, raw in entries:
        if raw is None:
            continue
        try:
            lease = msgspec.json.decode(raw, type=Lease)
        except msgspec.MsgspecError:
            malformed += 1
            continue
        if lease.worker_id == name:
            leases[WorkerId(name)] = lease
        else:
            malformed += 1
    return leases, malformed


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode("utf-8", "replace")


# The list of workers is no KEYS of it: who may only add to it could not name it there.
# A counter that is lost or behind (Redis was flushed, or restored from an old dump) is set forward by whoever lives.
_RENEW = """
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
local epoch = tonumber(ARGV[1])
if newest > epoch then return newest end
if newest < epoch then redis.call('SET', KEYS[1], ARGV[1]) end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', ARGV[5], ARGV[4])
return epoch
"""

_RELEASE = """
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
if newest > tonumber(ARGV[1]) then return newest end
redis.call('DEL', KEYS[2])
return newest
"""
