"""A router as a process: one ready line, one line for each thing that can be wrong, and a clean end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

import pando
from pando.errors import Unavailable
from pando.v1 import admin_pb2, admin_pb2_grpc
from router.auth import key_hash

ROOT = Path(__file__).resolve().parents[2]
ANY_PORTS = ["--port", "0", "--http-port", "0", "--admin-port", "0"]

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts `python -m router` with flags and environment; whatever is left is killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def make(*flags: str, **env: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "router", "--json", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=kept | env,
        )
        running.append(process)
        return process

    yield make
    for process in running:
        process.kill()
        process.communicate()


def ready(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate(timeout=10)[1]
    return json.loads(line)


def ended(process: subprocess.Popen[str]) -> str:
    """The one line of a router that could not start."""
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2, (process.returncode, err)
    assert out == ""
    lines = [line for line in err.splitlines() if "WARNING" not in line]
    assert len(lines) == 1 and lines[0].startswith("pando router: "), err
    return lines[0]


def status(url: str, key: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_a_router_without_workers_listens_and_says_so(start: Start, redis_url: str) -> None:
    process = start("--redis", redis_url, "--cluster", "alone", *ANY_PORTS)
    found = ready(process)
    assert set(found) >= {"router", "grpc", "http", "admin", "pid"} and int(found["pid"]) == process.pid
    assert status(f"http://{found['http']}/health") == 503
    assert status(f"http://{found['http']}/metrics") == 200
    with grpc.insecure_channel(found["grpc"]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert check.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with grpc.insecure_channel(found["admin"]) as channel:
        stats = admin_pb2_grpc.AdminStub(channel).GetStats(admin_pb2.GetStatsRequest(), timeout=5)
        assert stats.router == found["router"] and stats.index_connected
    with pando.Client(found["grpc"]) as client:
        assert client.list_models()[0].name == "pando-tiny"
        with pytest.raises((Unavailable, pando.errors.DeadlineExceeded)):
            client.generate(text="x", timeout=2.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 0
    assert "Traceback" not in err and "never retrieved" not in err, err


def test_sigint_ends_it_too(start: Start, redis_url: str) -> None:
    process = start("--redis", redis_url, "--cluster", "alone2", *ANY_PORTS)
    ready(process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert process.returncode == 0


def test_keys_open_other_addresses(start: Start, redis_url: str, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenants.a]\nkeys = ["{key_hash("k")}"]\n')
    flags = ["--redis", redis_url, "--cluster", "keyed", "--host", "0.0.0.0", "--tenants", str(tenants), *ANY_PORTS]
    found = ready(start(*flags, PANDO_ADMIN_KEY="root"))
    target = found["grpc"].replace("0.0.0.0", "127.0.0.1")
    with pando.Client(target, tenant="a") as stranger, pytest.raises(pando.errors.Unauthenticated):
        stranger.list_models()
    with pando.Client(target, api_key="k") as client:
        assert client.list_models()
    http = found["http"].replace("0.0.0.0", "127.0.0.1")
    assert [status(f"http://{http}/metrics", key) for key in ("", "k", "root")] == [401, 401, 200]
    assert status(f"http://{http}/health") == 503


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "needs --redis"),
        (["--redis", "nonsense"], "Redis URL"),
        (["--redis", "redis://user:s3cret@127.0.0.1:1/0"], "Redis at redis://127.0.0.1:1/0 does not answer"),
        (["--redis", "REDIS", "--model", "/nowhere"], "/nowhere"),
        (["--redis", "REDIS", "--host", "0.0.0.0"], "--tenants"),
        (["--redis", "REDIS", "--tenants", "/nowhere.toml"], "cannot read the tenants file"),
        (["--redis", "REDIS", "--host", "256.0.0.1", "--tenants", "TENANTS", "--admin-key", "k"], "cannot listen"),
        (["--redis", "REDIS", "--port", "70000"], "cannot listen"),
        (["--redis", "REDIS", "--nonsense", "1"], "--nonsense"),
        (["--redis", "REDIS", "--port", "abc"], "whole number"),
    ],
)
def test_what_is_wrong_is_one_line(start: Start, redis_url: str, tmp_path: Path, flags: list[str], says: str) -> None:
    tenants = tmp_path / "t.toml"
    tenants.write_text(f'[tenants.a]\nkeys = ["{key_hash("k")}"]\n')
    given = [{"REDIS": redis_url, "TENANTS": str(tenants)}.get(flag, flag) for flag in flags]
    line = ended(
        start(*given, *([] if "--port" in given else ["--port", "0"]), "--http-port", "0", "--admin-port", "0")
    )
    assert says in line and "s3cret" not in line


@pytest.mark.parametrize("name", ["--port", "--http-port", "--admin-port"])
def test_a_taken_port_is_one_line(start: Start, redis_url: str, name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        ports = dict(zip(ANY_PORTS[::2], ANY_PORTS[1::2], strict=True)) | {name: str(taken.getsockname()[1])}
        flags = [part for pair in ports.items() for part in pair]
        assert "cannot listen" in ended(start("--redis", redis_url, *flags))


def test_a_second_router_needs_the_same_secret(start: Start, redis_url: str) -> None:
    flags = ["--redis", redis_url, "--cluster", "two", *ANY_PORTS]
    first = start(*flags, PANDO_CLUSTER_SECRET="one")
    ready(first)
    same = start(*flags, PANDO_CLUSTER_SECRET="one")
    ready(same)
    assert "another cluster secret" in ended(start(*flags, PANDO_CLUSTER_SECRET="two"))
    with redis.Redis.from_url(redis_url) as client:
        assert b"one" not in (client.get("two:secret-check") or b"")
    # Routers that died hold a claim for some seconds only.
    for process in (first, same):
        process.kill()
        process.communicate()
    ready(start(*flags, PANDO_CLUSTER_SECRET="two"))


def test_without_a_worker_a_caller_is_told_after_the_grace_and_not_later(start: Start, redis_url: str) -> None:
    where = ready(start("--redis", redis_url, *ANY_PORTS))
    began = time.monotonic()
    with pando.Client(where["grpc"]) as client, pytest.raises(Unavailable, match="no worker is ready") as caught:
        client.generate(text="x", timeout=30)
    assert caught.value.reason == "NO_WORKER"
    assert time.monotonic() - began < 8.0
