"""The embedded Redis: a real server that answers, forgets, and ends when told or when its parent dies."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from control.children import source_path
from control.redis_server import RedisServer, find_binary
from kvstore.redis_url import why_no_answer
from pando.errors import ConfigError


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone(pid: int) -> bool:
    return until(lambda: not alive(pid))


def test_it_answers_and_ends_without_a_trace() -> None:
    server = RedisServer()
    server.start()
    folder = Path(server.url.removeprefix("unix://")).parent
    try:
        assert not why_no_answer(server.url)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with redis.Redis.from_url(server.url) as client:
            assert client.set("a", "b") and client.get("a") == b"b"
            assert client.config_get("save")["save"] == ""
            assert client.config_get("port")["port"] == "0"
        pid = server.pid
        assert pid is not None
    finally:
        server.stop()
    assert gone(pid) and not folder.exists() and server.pid is None
    server.stop()


def test_a_server_that_died_starts_again_under_its_url() -> None:
    server = RedisServer()
    server.start()
    try:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while server.pid is not None:
            time.sleep(0.01)
        assert why_no_answer(server.url)
        server.start()
        assert not why_no_answer(server.url)
    finally:
        server.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
def test_it_dies_with_its_parent() -> None:
    script = (
        "import time\nfrom control.redis_server import RedisServer\n"
        "server = RedisServer()\nserver.start()\nprint(server.pid, server.url, flush=True)\ntime.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": source_path()}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout is not None
        pid, url = parent.stdout.readline().split()
        parent.kill()
        assert gone(int(pid))
    folder = Path(url.removeprefix("unix://")).parent
    assert until(lambda: not folder.exists())


def test_a_server_program_is_found_or_asked_for(tmp_path: Path) -> None:
    assert os.access(find_binary(), os.X_OK)
    mine = tmp_path / "valkey-server"
    mine.write_text("#!/bin/sh\n", "utf-8")
    mine.chmod(0o755)
    assert find_binary(path=str(tmp_path)) == str(mine)
    mine.unlink()
    with pytest.raises(ConfigError, match="--redis URL"):
        find_binary(path=str(tmp_path), package="no_such_package_here")


def test_a_program_that_is_no_server_is_one_clear_error() -> None:
    server = RedisServer(binary="/bin/false")
    try:
        with pytest.raises(ConfigError, match="did not start"):
            server.start()
    finally:
        server.stop()
