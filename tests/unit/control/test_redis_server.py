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
from control.redis_server import RedisServer, check_reachable, find_binary, without_password
from pando.errors import ConfigError


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_it_answers_and_ends_without_a_trace() -> None:
    server = RedisServer()
    server.start()
    folder = Path(server.url.removeprefix("unix://")).parent
    try:
        check_reachable(server.url)
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
        with pytest.raises(ConfigError):
            check_reachable(server.url)
        server.start()
        check_reachable(server.url)
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
    socket = Path(url.removeprefix("unix://"))
    for left in socket.parent.iterdir():
        left.unlink()
    socket.parent.rmdir()


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


def test_an_unreachable_redis_is_named_without_its_password(free_port: Callable[[], int]) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match="does not answer") as refused:
        check_reachable(f"redis://user:hunter2@127.0.0.1:{port}/0")
    assert str(port) in refused.value.message and "hunter2" not in refused.value.message
    with pytest.raises(ConfigError, match="redis://"):
        check_reachable(f"127.0.0.1:{port}")


def test_without_password() -> None:
    assert without_password("redis://u:p@h:1/0") == "redis://h:1/0"
    assert without_password("unix:///a/b.sock") == "unix:///a/b.sock"
    assert without_password("nothing") == "nothing"
