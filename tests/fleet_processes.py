"""Workers and routers as processes of their own on one Redis, for tests that ask as a client would."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import pando
from pando.errors import Unavailable
from router.auth import key_hash
from tests.conftest import RedisServer, unused_port

ROOT = Path(__file__).resolve().parents[1]
SECRET = "a secret of the cluster"
CLUSTER = "shared"


@dataclass
class Child:
    """A process and the line it printed when it was ready."""

    process: subprocess.Popen[str]
    ready: dict[str, Any]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@dataclass
class Fleet:
    """Two simulated workers, and routers as they are asked for; the key of a tenant is `key of NAME`."""

    redis: RedisServer
    folder: Path
    parts: ExitStack
    tenants: Mapping[str, str]
    env: Mapping[str, str]
    workers: list[Child] = field(default_factory=list)

    def launch(self, module: str, *flags: str) -> Child:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--json", "--redis", self.redis.url, "--cluster", CLUSTER, *flags],
            cwd=ROOT,
            env=env | {"PANDO_CLUSTER_SECRET": SECRET} | self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        self.parts.callback(process.stdout.close)
        child = Child(process, {})
        self.parts.callback(child.stop)
        return child

    def router(self) -> Child:
        ports = ["--port", "0", "--http-port", "0", "--admin-port", "0"]
        child = self.launch("router", *ports, "--tenants", str(self.folder / "tenants.toml"))
        child.ready = line(child)
        with self.client(child, next(iter(self.tenants))) as client:
            until(lambda: answers(client), 15)
        return child

    def client(self, router: Child, tenant: str) -> pando.Client:
        return pando.Client(router.ready["grpc"], api_key=f"key of {tenant}", timeout=20)


@contextmanager
def fleet_of(
    folder: Path, tenants: Mapping[str, str], *worker_flags: str, env: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """A fleet with these tenants, name to the rest of its table, and two workers that are up."""
    tables = (f'[tenants.{name}]\nkeys = ["{key_hash(f"key of {name}")}"]\n{rest}\n' for name, rest in tenants.items())
    (folder / "tenants.toml").write_text("\n".join(tables))
    with ExitStack() as parts:
        server = RedisServer(folder)
        server.start()
        parts.callback(server.stop)
        made = Fleet(server, folder, parts, tenants, env or {})
        flags = ("--runner", "simulated", "--model", "pando-tiny", *worker_flags)
        ports = [unused_port() for _ in range(2)]
        for number, port in enumerate(ports):
            own = ("--worker-id", f"w{number}", "--worker-metrics-port", f"{port}")
            made.workers.append(made.launch("worker", *own, *flags))
        for worker, port in zip(made.workers, ports, strict=True):
            worker.ready = line(worker) | {"http": f"127.0.0.1:{port}"}
        yield made


def line(child: Child) -> dict[str, Any]:
    """What a process says when it is ready."""
    assert child.process.stdout is not None
    said = child.process.stdout.readline()
    assert said, f"ended with {child.process.wait(10)}"
    return dict(json.loads(said))


def answers(client: pando.Client) -> bool:
    try:
        return bool(client.generate(token_ids=[1, 2, 3], max_tokens=1))
    except Unavailable:
        return False


def until(fact: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until something holds; fail the test if it takes too long."""
    ends = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < ends
        time.sleep(0.02)


def some_tokens(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 2000) for _ in range(count)]


def counters(address: str, prefix: str) -> dict[tuple[str, ...], float]:
    """Counters behind an HTTP address: (name without prefix, values of the labels in the order of their names)."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text.replace("# EOF", "")):
        for sample in family.samples:
            if sample.name.startswith(prefix) and sample.name.endswith("_total"):
                labels = (value for _, value in sorted(sample.labels.items()))
                found[sample.name.removeprefix(prefix).removesuffix("_total"), *labels] = sample.value
    return found
