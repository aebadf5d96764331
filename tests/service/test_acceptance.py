"""The whole service on real parts (Ray, Redis, gRPC, the built-in model), asked as a client would ask it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

import pando
from pando.v1 import admin_pb2, admin_pb2_grpc

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

BLOCK = 16
SYSTEM = "You are a careful assistant that answers questions about the Python standard library. " * 8


@dataclass
class Running:
    """A fleet started by `pando up` and the line it printed."""

    process: subprocess.Popen[str]
    ready: dict
    seconds: float

    @property
    def grpc(self) -> str:
        return self.ready["grpc"]

    @property
    def router_pid(self) -> int:
        """The router is the child whose command line says so."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        routers = [pid for pid in children if b"\0router\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        return int(routers[0])

    def workers(self) -> list[admin_pb2.Worker]:
        with grpc.insecure_channel(self.ready["admin"]) as channel:
            admin = admin_pb2_grpc.AdminStub(channel)
            return list(admin.ListWorkers(admin_pb2.ListWorkersRequest(), timeout=10).workers)

    def idle_workers(self, seconds: float = 20.0) -> list[admin_pb2.Worker]:
        """The workers once none has work and every block is free or cached; fails the test if that takes too long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            workers = self.workers()
            if all(_is_idle(worker) for worker in workers):
                return workers
            time.sleep(0.2)
        raise AssertionError(f"still busy: {self.workers()}")


def _is_idle(worker: admin_pb2.Worker) -> bool:
    whole = worker.free_blocks + worker.cached_blocks == worker.device_blocks
    return whole and not worker.running and not worker.waiting and not worker.queued_tokens


@pytest.fixture(scope="module")
def fleet() -> Iterator[Running]:
    started = time.monotonic()
    command = [sys.executable, "-m", "pando.cli", "up", "--workers", "2", "--device-blocks", "600", "--json"]
    ports = ["--port", "0", "--http-port", "0", "--admin-port", "0"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"pando up ended with {process.wait(30)}"
    yield Running(process, json.loads(line), time.monotonic() - started)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    process.stdout.close()


def ask(fleet: Running, tenant: str, text: str, max_tokens: int = 24) -> pando.Generation:
    with pando.Client(fleet.grpc, tenant=tenant) as client:
        return client.generate(text=text, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout=60)


def eventually_cached(fleet: Running, tenant: str, text: str) -> int:
    """Cached tokens of a repeated prompt, once the router knows where its blocks are (events take milliseconds)."""
    for _ in range(20):
        usage = ask(fleet, tenant, text, max_tokens=1).usage
        if usage.cached_tokens:
            return usage.cached_tokens
        time.sleep(0.1)
    return 0


def reuses_all(cached_tokens: int, num_tokens: int) -> bool:
    """Every full block, and what else is there of the next one; a token is always left to compute."""
    return (num_tokens - 1) // BLOCK * BLOCK <= cached_tokens < num_tokens


def test_a_repeated_prompt_is_cached_and_another_tenants_is_not(fleet: Running) -> None:
    prompt = f"{SYSTEM} What does os.path.join do? (isolation)"
    first = ask(fleet, "alice", prompt)
    assert first.usage.cached_tokens == 0
    again = ask(fleet, "alice", prompt)
    assert reuses_all(again.usage.cached_tokens, first.usage.prompt_tokens)
    other = ask(fleet, "bob", prompt)
    assert other.usage.cached_tokens == 0
    assert first.text == again.text == other.text
    assert reuses_all(ask(fleet, "alice", prompt).usage.cached_tokens, first.usage.prompt_tokens)
    assert reuses_all(ask(fleet, "bob", prompt).usage.cached_tokens, first.usage.prompt_tokens)


def test_greedy_text_is_the_same_alone_in_a_batch_after_a_hit_and_on_either_worker(fleet: Running) -> None:
    prompt = f"{SYSTEM} Describe the json module."
    alone = ask(fleet, "solo", prompt, 48)
    assert ask(fleet, "solo", prompt, 48).token_ids == alone.token_ids

    async def batch() -> list[pando.Generation]:
        async def one(tenant: str) -> pando.Generation:
            async with pando.AsyncClient(fleet.grpc, tenant=tenant) as client:
                return await client.generate(text=prompt, max_tokens=48, temperature=0.0, ignore_eos=True, timeout=60)

        return await asyncio.gather(*(one(f"batch-{i}") for i in range(16)))

    answers = asyncio.run(batch())
    assert {answer.usage.worker for answer in answers} == {worker["id"] for worker in fleet.ready["workers"]}
    assert {answer.text for answer in answers} == {alone.text}


def test_stream_is_the_same_text_in_pieces(fleet: Running) -> None:
    prompt = "def main():\n    "
    whole = ask(fleet, "streamer", prompt, 40)
    with pando.Client(fleet.grpc, tenant="streamer") as client:
        chunks = list(client.stream(text=prompt, max_tokens=40, temperature=0.0, ignore_eos=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40
    assert len(chunks) > 5


def test_a_thousand_requests_with_cancels_leak_nothing(fleet: Running) -> None:
    rng = random.Random(7)
    before = _descriptors(fleet)
    outcomes = asyncio.run(_storm(fleet, rng, requests=1000, concurrency=32))
    assert outcomes["failed"] == 0
    assert 50 <= outcomes["cancelled"] <= 150
    assert outcomes["done"] + outcomes["cancelled"] == 1000
    for worker in fleet.idle_workers():
        assert worker.free_blocks + worker.cached_blocks == worker.device_blocks
    after = _settled(fleet, before)
    assert all(after[pid] <= before[pid] + 8 for pid in before), (before, after)


async def _storm(fleet: Running, rng: random.Random, requests: int, concurrency: int) -> dict[str, int]:
    outcomes = {"done": 0, "cancelled": 0, "failed": 0}
    gate = asyncio.Semaphore(concurrency)
    clients = [pando.AsyncClient(fleet.grpc, tenant=f"storm-{i}") for i in range(4)]

    async def one(number: int, cancel_after: float | None) -> None:
        async with gate:
            prompt = f"Storm {number % 40}: " + "word " * (number % 60)
            call = asyncio.create_task(
                clients[number % 4].generate(text=prompt, max_tokens=8, temperature=0.0, ignore_eos=True, timeout=100)
            )
            if cancel_after is not None:
                await asyncio.sleep(cancel_after)
                call.cancel()
            try:
                await call
                outcomes["done"] += 1
            except asyncio.CancelledError:
                outcomes["cancelled"] += 1
            except pando.errors.PandoError:
                outcomes["failed"] += 1

    delays = [rng.random() * 0.05 if rng.random() < 0.1 else None for _ in range(requests)]
    await asyncio.gather(*(one(number, delay) for number, delay in enumerate(delays)))
    for client in clients:
        await client.close()
    return outcomes


def _descriptors(fleet: Running) -> dict[int, int]:
    """Open descriptors of the router and of each worker."""
    pids = [fleet.router_pid, *(worker["pid"] for worker in fleet.ready["workers"])]
    return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in pids}


def _settled(fleet: Running, before: dict[int, int]) -> dict[int, int]:
    for _ in range(50):
        after = _descriptors(fleet)
        if all(after[pid] <= before[pid] + 8 for pid in before):
            break
        time.sleep(0.2)
    return after


def test_a_killed_worker_returns_with_a_new_epoch_and_an_empty_cache(fleet: Running) -> None:
    prompt = f"{SYSTEM} Explain subprocess. (killed)"
    first = ask(fleet, "carol", prompt)
    assert eventually_cached(fleet, "carol", prompt)
    victim = next(worker for worker in fleet.workers() if worker.id == first.usage.worker)
    os.kill(victim.pid, signal.SIGKILL)
    reborn = _wait_for_new_epoch(fleet, victim)
    assert reborn.epoch > victim.epoch and reborn.pid != victim.pid
    # Nothing of the old life is credited: the first request after it computes everything, wherever it lands.
    after = ask(fleet, "carol", prompt)
    assert after.usage.predicted_cached_tokens == 0
    assert after.usage.cached_tokens == 0
    assert after.text == first.text
    assert reuses_all(eventually_cached(fleet, "carol", prompt), first.usage.prompt_tokens)


def _wait_for_new_epoch(fleet: Running, victim: admin_pb2.Worker) -> admin_pb2.Worker:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for worker in fleet.workers():
            ready = worker.state == admin_pb2.WORKER_STATE_READY
            if worker.id == victim.id and worker.epoch != victim.epoch and ready:
                return worker
        time.sleep(0.25)
    raise AssertionError(f"{victim.id} did not come back")


def test_up_printed_what_scripts_rely_on(fleet: Running) -> None:
    assert set(fleet.ready) >= {"grpc", "http", "admin", "redis", "ray", "workers"}
    assert all(set(worker) >= {"id", "epoch", "pid", "grpc"} for worker in fleet.ready["workers"])
