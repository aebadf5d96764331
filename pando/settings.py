"""Settings of every process as frozen dataclasses: defaults <- TOML file <- environment <- command line.

Knows nothing of what the settings do. An unknown key, from wherever it comes, is a `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from pando.errors import ConfigError

ENV_PREFIX = "PANDO_"


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), secret: bool = False) -> Any:
    """A dataclass field with what `--help` and validation need."""
    return field(default=default, metadata={"help": help, "choices": choices, "secret": secret})


@dataclass(frozen=True, kw_only=True)
class FleetSettings:
    """What router and worker must agree on."""

    model: str = option("pando-tiny", "model folder, 'pando-tiny', or a Hugging Face hub id")
    redis: str = option("", "Redis URL; empty starts one of our own where the command allows it", secret=True)
    redis_ca: str = option("", "file of the CA of a rediss:// server's certificate; empty takes the system's")
    redis_cert: str = option("", "file of the client certificate for a rediss:// server that asks for one")
    redis_key: str = option("", "file of that certificate's key")
    cluster: str = option("pando", "name of the fleet: the namespace of its keys in Redis and of its Ray actors")
    block_size: int = option(16, "token positions in a KV block")
    link_token: str = option("", "bearer token of the workers' ports; needed off loopback", secret=True)

    def __post_init__(self) -> None:
        if not (self.link_token.isascii() and self.link_token.isprintable()) or " " in self.link_token:
            raise ConfigError("the link token must be printable ASCII without spaces")
        if self._tls_files() and not self.redis.startswith("rediss://"):
            raise ConfigError("redis_ca, redis_cert and redis_key are for a rediss:// URL")
        if bool(self.redis_cert) != bool(self.redis_key):
            raise ConfigError("redis_cert and redis_key go together")

    @property
    def redis_url(self) -> str:
        """The URL as a Redis client takes it: the files for TLS are part of it."""
        files = self._tls_files()
        if not files:
            return self.redis
        return f"{self.redis}{'&' if '?' in self.redis else '?'}{urlencode(files)}"

    def _tls_files(self) -> dict[str, str]:
        named = {"ssl_ca_certs": self.redis_ca, "ssl_certfile": self.redis_cert, "ssl_keyfile": self.redis_key}
        return {name: file for name, file in named.items() if file}


@dataclass(frozen=True, kw_only=True)
class WorkerSettings(FleetSettings):
    """One worker process: one replica of the model."""

    worker_id: str = option("worker-0", "name of this worker in the fleet, kept over restarts")
    host: str = option("127.0.0.1", "address the worker listens on and gives to routers")
    worker_port: int = option(0, "port of the worker link; 0 takes a free one")
    worker_metrics_port: int = option(0, "HTTP port of the worker's /metrics; 0 serves none")
    runner: str = option("model", "'model' computes; 'simulated' is a cost model", choices=("model", "simulated"))
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    dtype: str = option("auto", "weights and activations", choices=("auto", "float32", "bfloat16", "float16"))
    kv_dtype: str = option(
        "auto",
        "KV: as the activations, or kept in another type; int8, fp8 and int4 have a scale for each token and head",
        choices=("auto", "bfloat16", "float16", "float32", "int8", "fp8", "int4"),
    )
    device_blocks: int = option(0, "KV blocks on the device; 0 sizes the pool from free memory")
    memory_fraction: float = option(0.9, "share of free device memory for KV when device_blocks is 0")
    cpu_blocks: int = option(0, "KV blocks in CPU memory behind the device pool")
    cpu_kv_dtype: str = option("same", "KV in CPU memory: as it is, or int8 with scales", choices=("same", "int8"))
    window: int = option(0, "attend to so many last positions only, at constant memory; 0 is the model's own attention")
    sinks: int = option(0, "with --window: attend to so many first positions too")
    eviction: str = option("slru", "which cached KV block goes first", choices=("slru", "lru", "fifo"))
    deterministic: str = option(
        "off", "equal tokens in any batch, chunk and state of the cache, at a price in speed", choices=("on", "off")
    )
    prefix_cache: str = option("on", "reuse KV of shared prefixes", choices=("on", "off"))
    max_batch_tokens: int = option(512, "token budget of one step")
    max_sequences: int = option(64, "most sequences that run at once")
    max_waiting: int = option(4096, "most sequences that wait; beyond, the tenant most over its part is refused")
    max_model_len: int = option(0, "longest prompt plus answer; 0 takes the model's own")
    overlap: str = option(
        "auto", "launch a step while the one before it runs; auto: not on a CPU", choices=("auto", "on", "off")
    )
    cuda_graphs: str = option("auto", "on CUDA, replay recorded launches in steps of decoding", choices=("auto", "off"))
    threads: int = option(0, "CPU threads of the model; 0 leaves it to the device")
    lease_ttl_s: float = option(2.0, "life of the worker's lease in Redis")
    heartbeat_s: float = option(0.5, "time between heartbeats")
    simulated_prefill_tokens_per_s: float = option(20000.0, "simulated runner: prefill rate")
    simulated_step_ms: float = option(1.0, "simulated runner: fixed cost of a step")
    simulated_block_bytes: int = option(0, "simulated runner: what a block weighs between workers; 0: its token ids")

    @property
    def redis_url(self) -> str:
        """As of every process, with the id of this worker for `{worker_id}`: each may be a Redis user of its own."""
        return super().redis_url.replace("{worker_id}", quote(self.worker_id, safe=""))


@dataclass(frozen=True, kw_only=True)
class RouterSettings(FleetSettings):
    """One router process."""

    router_id: str = option("", "name of this router; empty makes one")
    host: str = option("127.0.0.1", "address to listen on; anything but loopback needs --tenants")
    port: int = option(8470, "gRPC port; 0 takes a free one")
    http_port: int = option(8471, "HTTP port for /health and /metrics; 0 takes a free one")
    admin_port: int = option(8472, "admin gRPC port; 0 takes a free one")
    tenants: str = option("", "TOML file of tenants and their hashed keys")
    admin_key: str = option("", "bearer key of the admin port; needed off loopback", secret=True)
    cluster_secret: str = option("", "secret that keys every scope; equal on all routers of a fleet", secret=True)
    reflection: str = option("on", "gRPC server reflection", choices=("on", "off"))
    placement: str = option("cost", "how workers are chosen", choices=("cost", "round_robin"))
    max_message_bytes: int = option(4 * 1024 * 1024, "largest gRPC message taken")
    max_request_s: float = option(600.0, "longest a request may take; a client's deadline can be shorter")
    max_in_flight: int = option(1024, "most requests one router serves at once; no tenant fills the last eighth")
    tokenizer_threads: int = option(2, "threads that tokenize")
    processes: int = option(1, "router processes on the one gRPC port; HTTP and admin ports go up by 2 for each")
    reuse_port: str = option("off", "share the gRPC port with other routers of this user", choices=("on", "off"))
    tenant_metrics: int = option(256, "tenants that /metrics tells apart; all others are counted together")


@dataclass(frozen=True, kw_only=True)
class CrewSettings(WorkerSettings):
    """`pando workers`: workers under a supervisor in Ray."""

    workers: int = option(2, "number of workers")
    ray: str = option("", "Ray address to join; empty starts a local Ray")
    dashboard: str = option("off", "Ray dashboard", choices=("on", "off"))
    ready_timeout_s: float = option(120.0, "longest to wait for the workers to come up")


@dataclass(frozen=True, kw_only=True)
class UpSettings(RouterSettings, CrewSettings):
    """`pando up`: everything on one machine."""


S = TypeVar("S")
T = TypeVar("T")


def load(
    cls: type[S],
    flags: Mapping[str, object] | None = None,
    *,
    toml: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> S:
    """Build `cls` from its defaults, then a TOML file, then `PANDO_*` variables, then flags, last wins.

    Raises `ConfigError` naming the key and its source on an unknown key or a value of the wrong type.
    Environment variables that name no setting of any Pando process are errors; those of another process are not.
    """
    values: dict[str, Any] = {}
    if toml is not None:
        values |= _convert(cls, _read_toml(toml), str(toml))
    environment = os.environ if env is None else env
    values |= _convert(cls, _from_env(cls, environment), "environment")
    values |= _convert(cls, flags or {}, "command line")
    return cls(**values)


def narrow(cls: type[T], settings: Any, **changes: Any) -> T:
    """The part of `settings` that another process needs, e.g. `narrow(WorkerSettings, up, worker_id="w1")`."""
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name in names}
    return cls(**(kept | changes))


def to_flags(settings: Any) -> list[str]:
    """The command line that gives these settings, secrets left out: pass those by environment."""
    flags: list[str] = []
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if value != f.default and not f.metadata["secret"]:
            flags += [f"--{f.name.replace('_', '-')}", str(value)]
    return flags


def secrets(settings: Any) -> dict[str, str]:
    """The secret settings as environment variables for a child process."""
    return {
        ENV_PREFIX + f.name.upper(): str(getattr(settings, f.name))
        for f in dataclasses.fields(settings)
        if f.metadata["secret"] and getattr(settings, f.name)
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the settings file {path}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


# Variables with our prefix that are no setting: they name folders for benches and tests, or the client's own defaults.
_NOT_SETTINGS = frozenset({"TRACES", "TARGET", "API_KEY", "TENANT", "CONFIG"})


def _from_env(cls: type, env: Mapping[str, str]) -> dict[str, str]:
    mine = {f.name for f in dataclasses.fields(cls)}
    known = mine | {f.name for f in dataclasses.fields(UpSettings)}
    found: dict[str, str] = {}
    for name, value in env.items():
        if not name.startswith(ENV_PREFIX) or name.removeprefix(ENV_PREFIX) in _NOT_SETTINGS:
            continue
        key = name.removeprefix(ENV_PREFIX).lower()
        if key not in known:
            raise ConfigError(f"unknown setting {name} in the environment")
        if key in mine:
            found[key] = value
    return found


def _convert(cls: type, raw: Mapping[str, object], source: str) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    types = typing.get_type_hints(cls)
    out: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise ConfigError(f"unknown setting '{key}' in {source}")
        out[name] = _value(types[name], value, f"'{key}' in {source}")
        choices = fields[name].metadata["choices"]
        if choices and out[name] not in choices:
            raise ConfigError(f"'{key}' in {source} must be one of {', '.join(choices)}")
    return out


def _value(kind: type, value: object, where: str) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ConfigError(f"{where} must be text")
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} must be a number")
    try:
        number = kind(value)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{where} must be {'a whole number' if kind is int else 'a number'}") from error
    if not 0 <= number < float("inf") or (kind is int and float(value) != number):
        raise ConfigError(f"{where} must be {'a whole number' if kind is int else 'a number'}, 0 or more")
    return number
