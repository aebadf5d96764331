"""Fixtures for all tests: real servers on free ports, started once and stopped at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TRITON_INTERPRET", "1")
# Two spinning thread pools on busy cores slow each other down by an order of magnitude.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def redis_server_binary() -> str:
    """A real Redis server: on PATH, or the one a development dependency carries."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    carried = Path(sys.prefix) / "bin" / "redis-server"
    assert carried.exists(), "no redis-server: run `make setup`"
    return str(carried)


class RedisServer:
    """A redis-server on a free loopback port that a test may stop and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = unused_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = f"--port {self.port} --bind 127.0.0.1 --appendonly no --dir {self.folder}".split()
        command = [redis_server_binary(), *options, "--save", ""]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.02)
        else:
            raise RuntimeError("redis-server did not start")
        client.close()

    def stop(self) -> None:
        """Kill it: nothing is saved."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def _shared_redis() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="pando-test-") as folder:
        server = RedisServer(Path(folder))
        server.start()
        yield server
        server.stop()


@pytest.fixture
def redis_url(_shared_redis: RedisServer) -> str:
    """URL of a real, empty Redis that other tests also use, one after the other."""
    with redis.Redis.from_url(_shared_redis.url) as client:
        client.flushall()
    return _shared_redis.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, to stop and start at will."""
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Makes port numbers that nothing listened on a moment ago."""
    return unused_port


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
