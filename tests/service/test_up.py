"""`pando up` as a user has it: one line when ready, requests served over faults, and nothing left when it ends."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import grpc
import pytest
import redis

from control.children import adopt_orphans, descendants, source_path
from pando.admin_client import AdminClient
from pando.client import Client
from pando.errors import Unavailable
from pando.v1 import admin_pb2

pytestmark = pytest.mark.ray

UP = ["up", "--json", "--runner", "simulated", "--port", "0", "--http-port", "0", "--admin-port", "0"]


@pytest.fixture(scope="module", autouse=True)
def adopts_orphans() -> None:
    """Whatever a command leaves behind becomes a child of this process, and is seen."""
    adopt_orphans()


@dataclass
class Command:
    """A running `pando` command; `before` are the processes there were before it."""

    process: subprocess.Popen[str]
    before: frozenset[int]
    errors: IO[str]

    def left(self) -> dict[int, str]:
        """Living processes of this command, itself included: id and command line."""
        found = {}
        for pid in descendants():
            with contextlib.suppress(OSError):
                if pid not in self.before:
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        return found

    def line(self) -> dict[str, Any]:
        """Its next line of output, as JSON."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"it ended with {self.process.wait()}"
        document: dict[str, Any] = json.loads(text)
        return document

    def folders(self) -> set[Path]:
        """The temporary folders that its processes name on their command lines."""
        lines = "\0".join(self.left().values())
        return {Path(found) for found in re.findall(r"/[^\0=:\s]*/pando-(?:ray|redis)-\w+", lines)}

    def said(self) -> str:
        """What it and its children have written to stderr."""
        self.errors.seek(0)
        return self.errors.read()

    def end(self, number: int = signal.SIGINT) -> int:
        """Signal it and wait for its end."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        print(self.said(), file=sys.stderr)
        self.errors.close()


def start(*argv: str, env: dict[str, str] | None = None) -> Command:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
    env = kept | {"PYTHONPATH": source_path()} | (env or {})
    before = frozenset(descendants())
    command = [sys.executable, "-m", "pando.cli", *argv]
    errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - `Command.close` closes it
    return Command(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True), before, errors)


def run(*argv: str, text: str | None = None) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PANDO_")}
    command = [sys.executable, "-m", "pando.cli", *argv]
    env = kept | {"PYTHONPATH": source_path()}
    done = subprocess.run(command, env=env, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def up(_shared_redis: object) -> Iterator[Command]:
    """One fleet for most tests; the suite's own Redis is started before it, so as not to count as its process."""
    command = start(*UP, "--workers", "2")
    yield command
    command.close()


@pytest.fixture(scope="module")
def ready(up: Command) -> dict[str, Any]:
    return up.line()


def ready_epochs(admin_target: str, *, key: str = "") -> dict[str, int]:
    with AdminClient(admin_target, key=key) as admin:
        try:
            workers = admin.workers()
        except Unavailable:
            return {}
    return {worker.id: worker.epoch for worker in workers if worker.state == admin_pb2.WORKER_STATE_READY}


def redis_servers(up: Command) -> list[int]:
    return [pid for pid, command in up.left().items() if "redis-server" in command and "import ctypes" not in command]


def listening(pids: Iterable[int]) -> dict[int, str]:
    """TCP ports on which these processes listen, and the address of each."""
    open_files = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                open_files.add(os.readlink(path))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in open_files:
                host, port = local.split(":")
                words = struct.iter_unpack("<I", bytes.fromhex(host))
                address = ipaddress.ip_address(b"".join(struct.pack(">I", *word) for word in words))
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                found[int(port, 16)] = str(mapped or address)
    return found


def blocks_sigterm(pid: int) -> bool:
    (mask,) = re.findall(r"^SigBlk:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for temporary files whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="up-", dir="/tmp") as name:
        yield Path(name)


def greedy(target: str) -> str:
    with Client(target, tenant="a") as client:
        return client.generate(text="hello", max_tokens=8, temperature=0.0, ignore_eos=True).text


def test_the_line_names_every_part(ready: dict[str, Any]) -> None:
    assert set(ready) == {"grpc", "http", "admin", "redis", "ray", "workers"}
    assert [sorted(worker) for worker in ready["workers"]] == [["epoch", "grpc", "id", "pid"]] * 2
    assert [worker["id"] for worker in ready["workers"]] == ["worker-0", "worker-1"]
    assert ready_epochs(ready["admin"]) == {"worker-0": 1, "worker-1": 1}


def test_every_port_is_on_loopback_and_a_worker_s_asks_for_the_token(up: Command, ready: dict[str, Any]) -> None:
    hosts = listening(up.left())
    ours = {ready[name] for name in ("grpc", "http", "admin", "ray")} | {worker["grpc"] for worker in ready["workers"]}
    assert {int(address.rpartition(":")[2]) for address in ours} <= set(hosts)
    assert [host for host in hosts.values() if not ipaddress.ip_address(host).is_loopback] == []
    with grpc.insecure_channel(ready["workers"][0]["grpc"]) as channel:
        drain = channel.unary_unary("/pando.worker.v1.WorkerLink/Drain")
        with pytest.raises(grpc.RpcError) as refused:
            drain(b"", timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_no_process_is_deaf_to_sigterm(up: Command, ready: dict[str, Any]) -> None:
    names = up.left()
    assert all(any(part in name for name in names.values()) for part in ("gcs_server", "raylet", "ray::", "router"))
    assert {name for pid, name in names.items() if blocks_sigterm(pid)} == set()


def test_generate_streams_text_and_says_what_it_took(ready: dict[str, Any]) -> None:
    sampling = ["--max-tokens", "8", "--temperature", "0", "--ignore-eos", "--target", ready["grpc"], "--tenant", "a"]
    text = greedy(ready["grpc"])
    assert run("generate", "hello", *sampling) == text + "\n"
    assert run("generate", "-", *sampling, text="hello") == text + "\n"
    document = json.loads(run("generate", "hello", "--json", *sampling))
    assert document["text"] == text and len(document["token_ids"]) == 8
    assert document["usage"]["completion_tokens"] == 8 and document["usage"]["worker"].startswith("worker-")


def test_chat_answers_every_line_of_piped_input(ready: dict[str, Any]) -> None:
    said = run("chat", "--max-tokens", "4", "--ignore-eos", "--target", ready["grpc"], text="hello\n\nand again\n")
    assert said.endswith("\n") and said.strip()


def test_status_and_health(ready: dict[str, Any]) -> None:
    document = json.loads(run("status", "--json", "--target", ready["admin"]))
    assert [worker["state"] for worker in document["workers"]] == ["ready", "ready"]
    assert document["router"]["requests"] >= 1
    shown = run("status", "--target", ready["admin"])
    assert "worker-1" in shown and "\x1b" not in shown
    assert run("health", "--target", ready["grpc"]) == "SERVING\n"


def test_a_killed_worker_comes_back_and_serves(ready: dict[str, Any]) -> None:
    expected = greedy(ready["grpc"])
    os.kill(ready["workers"][0]["pid"], signal.SIGKILL)
    until(lambda: ready_epochs(ready["admin"]) == {"worker-0": 2, "worker-1": 1})
    assert greedy(ready["grpc"]) == expected


def test_a_killed_router_comes_back_on_its_ports(up: Command, ready: dict[str, Any]) -> None:
    expected = greedy(ready["grpc"])
    (router,) = (pid for pid, command in up.left().items() if "-m\0router\0" in command)
    os.kill(router, signal.SIGKILL)
    until(lambda: router not in up.left() and len(ready_epochs(ready["admin"])) == 2)
    assert greedy(ready["grpc"]) == expected


def test_a_killed_redis_comes_back_and_requests_go_on(up: Command, ready: dict[str, Any]) -> None:
    expected = greedy(ready["grpc"])
    (server,) = redis_servers(up)
    os.kill(server, signal.SIGKILL)
    assert greedy(ready["grpc"]) == expected
    until(lambda: redis_servers(up) not in ([], [server]))
    until(lambda: len(ready_epochs(ready["admin"])) == 2)
    assert greedy(ready["grpc"]) == expected


def test_ctrl_c_ends_everything_and_a_second_one_does_no_harm(up: Command, ready: dict[str, Any]) -> None:
    folders = up.folders()
    assert Path(ready["redis"].removeprefix("unix://")).parent in folders and len(folders) == 2
    assert len(up.left()) > 5
    up.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert up.end(signal.SIGINT) == 0
    assert up.left() == {}
    assert not [folder for folder in folders if folder.exists()]
    assert not re.search(r"^[EWI]\d{4} |goaway|chttp2", up.said(), re.MULTILINE | re.IGNORECASE)


@pytest.mark.parametrize("after_s", [0.6, 3.0])
def test_a_signal_while_starting_ends_everything(after_s: float, short_folder: Path) -> None:
    command = start(*UP, "--workers", "1", env={"TMPDIR": str(short_folder)})
    try:
        time.sleep(after_s)
        code = command.end(signal.SIGTERM)
        assert code in (128 + signal.SIGTERM, -signal.SIGTERM)
        assert command.left() == {}
        assert list(short_folder.iterdir()) == []
    finally:
        command.close()


# Sends itself SIGTERM at the moment that is named: Ray starts a process, or has just set its own handler of it in C++.
SIGNALLED = """
import os, signal, sys
import ray._raylet
from ray._private import services
from control.cluster import Cluster
from pando.commands.serve import supervised

def signalled(holder, name):
    before = getattr(holder, name)
    def now(*arguments, **keywords):
        made = before(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)
        return made
    setattr(holder, name, now)

def work(out):
    signalled(*{"process": (services, "start_ray_process"), "handler": (ray._raylet, "CoreWorker")}[sys.argv[1]])
    cluster = Cluster()
    try:
        cluster.start()
    finally:
        cluster.stop()
    return 0

sys.exit(supervised("test", work))
"""


@pytest.mark.parametrize("moment", ["process", "handler"])
def test_ray_s_own_handlers_of_a_signal_end_nothing(moment: str, short_folder: Path) -> None:
    env = os.environ | {"PYTHONPATH": source_path(), "TMPDIR": str(short_folder)}
    before = frozenset(descendants())
    done = subprocess.run([sys.executable, "-c", SIGNALLED, moment], env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, b"")
    assert not frozenset(descendants()) - before
    assert list(short_folder.iterdir()) == []


def test_a_killed_up_takes_everything_with_it() -> None:
    command = start(*UP, "--workers", "1")
    try:
        command.line()
        folders = command.folders()
        assert len(folders) == 2
        command.process.kill()
        command.process.wait()
        until(lambda: command.left() == {})
        assert not [folder for folder in folders if folder.exists()]
    finally:
        command.close()


def test_routers_and_workers_run_apart(own_redis: Any) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", "hunter2")
    env = {"PANDO_REDIS": own_redis.url.replace("://", "://:hunter2@"), "PANDO_LINK_TOKEN": "token-of-the-fleet"}
    commands = [start("workers", "--json", "--runner", "simulated", "--workers", "1", env=env)]
    env |= {"PANDO_CLUSTER_SECRET": "of both routers", "PANDO_ADMIN_KEY": "k"}
    try:
        for _ in range(2):
            commands.append(start("router", *UP[1:2], *UP[4:], env=env))
        listening = [command.line() for command in commands]
        assert [worker["id"] for worker in listening[0]["workers"]] == ["worker-0"]
        texts = set()
        for router in listening[1:]:
            until(lambda target=router["admin"]: ready_epochs(target, key="k") == {"worker-0": 1})
            texts.add(greedy(router["grpc"]))
        assert len(texts) == 1
        assert not [line for command in commands for line in command.left().values() if "hunter2" in line]
        assert [command.end(signal.SIGTERM) for command in reversed(commands)] == [0, 0, 0]
        assert commands[0].left() == {}
    finally:
        for command in commands:
            command.close()


def test_the_demo_compares_and_leaves_nothing() -> None:
    command = start("demo", "--json", "--runner", "simulated")
    try:
        document = command.line()
        assert command.process.wait(30) == (0 if document["ok"] else 1)
        assert command.left() == {}
    finally:
        command.close()
    second_wave = document["second_wave"]
    assert second_wave["full_block_tokens"] == 1024 and second_wave["all_blocks_hit"]
    assert all(1024 <= cached < 1024 + 16 for cached in second_wave["cached_tokens"])
    assert document["with_reuse"]["total"]["requests"] == document["equal_answers"] == 64
    assert document["without_reuse"]["total"]["cached_tokens"] == 0
    assert document["ttft_ratio"] < 1
