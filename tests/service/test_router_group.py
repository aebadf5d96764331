"""Several router processes behind one gRPC port: all serve, one may die, all end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pando.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def group(*flags: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
    ports = ["--port", "0", "--http-port", "0", "--admin-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pando.cli", "router", "--json", *ports, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)[1]
        yield process, json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def call(target: str) -> None:
    """One call over a connection of its own."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    with grpc.insecure_channel(target, options=options) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5, metadata=[("x-pando-tenant", "a")])


def uptime(admin: str) -> float:
    with grpc.insecure_channel(admin) as channel:
        stats = admin_pb2_grpc.AdminStub(channel).GetStats(admin_pb2.GetStatsRequest(), timeout=5)
        return float(stats.uptime_s)


def served(routers: list[dict[str, str]]) -> list[float]:
    """Calls of ListModels that each has answered, from its own metrics."""
    counts = []
    for router in routers:
        with urllib.request.urlopen(f"http://{router['http']}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        mine = [line for line in lines if "ListModels" in line and "_created" not in line]
        counts.append(sum(float(line.rsplit(" ", 1)[1]) for line in mine))
    return counts


@pytest.mark.timeout(90)
def test_all_serve_one_port_and_one_may_die(redis_url: str) -> None:
    with group("--redis", redis_url, "--processes", "3") as (process, said):
        routers = said["routers"]
        assert len({router["admin"] for router in routers}) == 3
        assert {router["grpc"] for router in routers} == {said["grpc"]}
        for _ in range(60):
            call(said["grpc"])
        before = served(routers)
        assert sum(before) == 60 and min(before) > 0
        victim = next(pid for pid in children(process.pid) if "--reuse-port" in cmdline(pid))
        os.kill(victim, signal.SIGKILL)
        ends = time.monotonic() + 30
        while len([pid for pid in children(process.pid) if "--reuse-port" in cmdline(pid)]) < 3 or not up(routers):
            assert time.monotonic() < ends
            time.sleep(0.2)
        for _ in range(30):
            call(said["grpc"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) in (0, 143)
        assert not children(process.pid)


def test_a_number_of_processes_that_makes_no_sense(redis_url: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pando.cli", "router", "--redis", redis_url, "--processes", "65"],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
    )
    assert answer.returncode == 2
    assert answer.stderr.strip() == "pando router: --processes must be from 1 to 64"


def up(routers: list[dict[str, str]]) -> bool:
    try:
        return all(uptime(router["admin"]) >= 0 for router in routers)
    except grpc.RpcError:
        return False


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
