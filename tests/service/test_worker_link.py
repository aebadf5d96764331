"""A whole worker over real gRPC and real Redis, seen through the link as a router sees it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.block_key import block_keys, key_fingerprint
from kvstore.events import BlocksRemoved, BlocksStored, decode
from kvstore.lease import Lease, view_leases
from kvstore.memory_index import MemoryIndex
from kvstore.scope import Region, ScopeRoot
from pando.errors import ConfigError
from pando.settings import WorkerSettings
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from router.worker_link import WorkerHello, WorkerLink
from worker.process import WorkerProcess, WorkerReady
from worker.simulated_runner import load_simulated_runner

ROOT = b"r" * 16
BASE = {
    "runner": "simulated",
    "model": "nobody/simulated",
    "device_blocks": 256,
    "max_model_len": 2048,
    "simulated_step_ms": 0.2,
    "simulated_prefill_tokens_per_s": 1e6,
}


class Client:
    """A router's end of a session, and what came through it."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, pb.SequenceOutput] = {}
        self.admissions: dict[int, pb.Admission] = {}
        self.loads: list[pb.Load] = []
        self.batches: list[Any] = []
        self.pongs: list[int] = []

    async def send(self, **message: Any) -> None:
        await self.call.write(pb.RouterMessage(**message))

    async def submit(self, sequence: int, token_ids: list[int], max_tokens: int = 8, **fields: Any) -> None:
        fields = {
            "attempt": 1,
            "num_prompt_tokens": len(token_ids),
            "regions": [pb.Region(scope_root=ROOT)],
            "sampling": pb.SamplingParams(max_tokens=max_tokens, top_p=1.0),
        } | fields
        await self.send(submit=pb.Submit(sequence=sequence, token_ids=token_ids, **fields))

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                message = await self.call.read()
                assert message is not grpc.aio.EOF
                self.take(message)

    async def ended(self, *sequences: int) -> None:
        await self.until(lambda: all(sequence in self.ends for sequence in sequences))

    def take(self, message: pb.WorkerMessage) -> None:
        match message.WhichOneof("message"):
            case "step":
                for output in message.step.sequences:
                    self.take_output(output)
            case "load":
                self.loads.append(message.load)
            case "events":
                self.batches += [decode(payload) for payload in message.events.batches]
            case "pong":
                self.pongs.append(message.pong.nonce)

    def take_output(self, output: pb.SequenceOutput) -> None:
        ended = self.ends.get(output.sequence)
        assert ended is None or ended.attempt != output.attempt, "an output after the end"
        tokens = self.tokens.setdefault(output.sequence, [])
        if tokens:
            assert not output.HasField("admission")
        tokens += output.token_ids
        if output.HasField("admission"):
            self.admissions[output.sequence] = output.admission
        if output.finish:
            self.ends[output.sequence] = output


@pytest.fixture
def start() -> Iterator[Callable[..., WorkerReady]]:
    """Starts workers; `start.process` is the last one."""
    processes: list[WorkerProcess] = []

    def run(**changes: Any) -> WorkerReady:
        process = WorkerProcess(WorkerSettings(**(BASE | changes)))
        processes.append(process)
        run.process = process  # type: ignore[attr-defined]
        return process.start()

    yield run
    for process in processes:
        process.stop()


def fingerprint(**changes: Any) -> str:
    return key_fingerprint(load_simulated_runner(WorkerSettings(**(BASE | changes))).spec.fingerprint, 16)


@asynccontextmanager
async def session(ready: WorkerReady, **hello: Any) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(ready.address) as channel:
        call = worker_pb2_grpc.WorkerLinkStub(channel).Session()
        hello = {"router": "r", "key_fingerprint": fingerprint(), "epoch": ready.epoch} | hello
        await call.write(pb.RouterMessage(hello=pb.RouterHello(**hello)))
        client = Client(call)
        client.hello = (await call.read()).hello
        yield client
        call.cancel()


async def load(ready: WorkerReady, condition: Callable[[pb.Load], bool], seconds: float = 5.0) -> pb.Load:
    """Watch the worker through a session of our own until its load is so."""
    async with session(ready) as watcher:
        await watcher.until(lambda: bool(watcher.loads) and condition(watcher.loads[-1]), seconds)
        return watcher.loads[-1]


def idle(load: pb.Load) -> bool:
    return not load.running and not load.waiting and load.free_blocks + load.cached_blocks == load.device_blocks == 256


@pytest.mark.asyncio
async def test_tokens_come_with_index_admission_and_end(start: Callable[..., WorkerReady]) -> None:
    ready = start()
    async with session(ready) as router:
        hello = router.hello
        assert (hello.worker, hello.epoch, hello.block_size, hello.device_blocks) == ("worker-0", 1, 16, 256)
        assert (hello.max_model_len, hello.vocab_size, hello.pid) == (2048, 8192, os.getpid())
        prompt = list(range(100, 150))
        await router.submit(1, prompt)
        await router.ended(1)
        await router.submit(2, prompt)
        await router.ended(2)
        assert len(router.tokens[1]) == 8
        assert router.tokens[1] == router.tokens[2]
        assert router.ends[1].finish == pb.FINISH_LENGTH
        assert [router.admissions[i].cached_device_tokens for i in (1, 2)] == [0, 48]
        await router.submit(3, prompt + router.tokens[1][:3], num_prompt_tokens=50)
        await router.ended(3)
        assert router.tokens[3] == router.tokens[1][3:]
        await router.send(ping=pb.Ping(nonce=77))
        await router.until(lambda: router.pongs == [77])


@pytest.mark.asyncio
async def test_many_sequences_of_two_routers(start: Callable[..., WorkerReady]) -> None:
    ready = start(max_sequences=8)
    async with session(ready) as first, session(ready, router="s") as second:
        for i in range(40):
            await first.submit(i, list(range(i, i + 20)))
            await second.submit(i, list(range(i, i + 20)))
        await asyncio.gather(first.ended(*range(40)), second.ended(*range(40)))
        assert first.tokens == second.tokens
    assert idle(await load(ready, idle))


@pytest.mark.asyncio
@pytest.mark.parametrize("wrong", [{"epoch": 2}, {"key_fingerprint": "0" * 32}])
async def test_a_router_that_differs_is_refused(start: Callable[..., WorkerReady], wrong: dict[str, Any]) -> None:
    ready = start()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        async with session(ready, **wrong) as router:
            await router.call.read()
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.asyncio
async def test_a_session_begins_with_a_hello_in_time(
    start: Callable[..., WorkerReady], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.server.HELLO_TIMEOUT_S", 0.2)
    ready = start()
    async with grpc.aio.insecure_channel(ready.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        call = stub.Session()
        await call.write(pb.RouterMessage(ping=pb.Ping(nonce=1)))
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await stub.Session().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.FetchBlocks(pb.FetchBlocksRequest(epoch=1)).read()
        assert refusal.value.code() is grpc.StatusCode.UNIMPLEMENTED


BAD = {
    "no tokens": {"token_ids": []},
    "token outside the vocabulary": {"token_ids": [5, 8192]},
    "no prompt": {"num_prompt_tokens": 0},
    "prompt longer than the tokens": {"num_prompt_tokens": 9},
    "no region": {"regions": []},
    "last region closed": {"regions": [pb.Region(scope_root=ROOT, end=2)]},
    "open region before the last": {"regions": [pb.Region(scope_root=ROOT), pb.Region(scope_root=ROOT)]},
    "short root": {"regions": [pb.Region(scope_root=b"r")]},
    "shared region over generated tokens": {
        "regions": [pb.Region(scope_root=ROOT, end=9), pb.Region(scope_root=ROOT)],
        "sampling": pb.SamplingParams(max_tokens=8),
    },
    "max_tokens 0": {"sampling": pb.SamplingParams()},
    "min_tokens over max_tokens": {"sampling": pb.SamplingParams(max_tokens=1, min_tokens=2)},
    "temperature nan": {"sampling": pb.SamplingParams(max_tokens=1, temperature=float("nan"))},
    "temperature negative": {"sampling": pb.SamplingParams(max_tokens=1, temperature=-1)},
    "top_p 2": {"sampling": pb.SamplingParams(max_tokens=1, top_p=2)},
    "min_p nan": {"sampling": pb.SamplingParams(max_tokens=1, min_p=float("nan"))},
    "stop id outside the vocabulary": {"sampling": pb.SamplingParams(max_tokens=1, stop_token_ids=[8192])},
    "penalty": {"sampling": pb.SamplingParams(max_tokens=1, presence_penalty=1)},
    "over the context": {"sampling": pb.SamplingParams(max_tokens=2**31)},
}


@pytest.mark.asyncio
async def test_a_bad_submit_ends_itself_and_nothing_else(start: Callable[..., WorkerReady]) -> None:
    ready = start()
    async with session(ready) as router:
        await router.submit(1, [1, 2, 3], max_tokens=400)
        for i, fields in enumerate(BAD.values(), start=10):
            await router.submit(i, **({"token_ids": [5, 6, 7]} | fields))
        await router.ended(*range(10, 10 + len(BAD)))
        await router.send()
        await router.send(cancel=pb.Cancel(sequence=999))
        await router.ended(1)
        reasons = {name: router.ends[i].reason for i, name in enumerate(BAD, start=10)}
        assert {router.ends[i].finish for i in range(10, 10 + len(BAD))} == {pb.FINISH_REJECTED}
        assert reasons.pop("penalty") == "UNSUPPORTED"
        assert reasons.pop("over the context") == "CONTEXT_LENGTH"
        assert set(reasons.values()) == {"MALFORMED"}
        assert router.ends[1].finish == pb.FINISH_LENGTH
        assert len(router.tokens[1]) == 400
    assert idle(await load(ready, idle))


@pytest.mark.asyncio
async def test_a_sequence_number_in_use_is_malformed(start: Callable[..., WorkerReady]) -> None:
    ready = start()
    async with session(ready) as router:
        await router.submit(1, [1, 2, 3], max_tokens=1000, attempt=1)
        await router.submit(1, [1, 2, 3], attempt=2)
        await router.ended(1)
        assert (router.ends[1].attempt, router.ends[1].reason) == (2, "MALFORMED")


@pytest.mark.asyncio
async def test_garbage_on_the_wire_ends_its_session_only(start: Callable[..., WorkerReady]) -> None:
    ready = start()
    async with session(ready) as router, grpc.aio.insecure_channel(ready.address) as channel:
        await router.submit(1, [1, 2, 3], max_tokens=300)
        raw = channel.stream_stream("/pando.worker.v1.WorkerLink/Session")()
        await raw.write(b"\x80\x04\x95garbage")
        assert await raw.code() is grpc.StatusCode.INVALID_ARGUMENT
        await router.ended(1)
        assert router.ends[1].finish == pb.FINISH_LENGTH


@pytest.mark.asyncio
async def test_cancel_and_deadline(start: Callable[..., WorkerReady]) -> None:
    ready = start(simulated_step_ms=2.0)
    async with session(ready) as router:
        await router.submit(1, [1, 2, 3], max_tokens=2000)
        await router.submit(2, [1, 2, 4], max_tokens=2000, deadline_ms=100)
        await router.until(lambda: bool(router.tokens.get(1)))
        await router.send(cancel=pb.Cancel(sequence=1))
        await router.ended(1, 2)
        assert router.ends[1].finish == pb.FINISH_CANCELLED
        assert router.ends[2].finish == pb.FINISH_DEADLINE
        assert len(router.tokens[2]) < 100
    assert idle(await load(ready, idle))


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["cancel", "half-close", "channel"])
async def test_a_session_that_ends_takes_its_sequences_along(start: Callable[..., WorkerReady], how: str) -> None:
    ready = start(simulated_step_ms=5.0)
    async with session(ready) as router:
        for i in range(4):
            await router.submit(i, list(range(200)), max_tokens=1500)
        await router.until(lambda: bool(router.tokens.get(3)))
        if how == "cancel":
            router.call.cancel()
        elif how == "half-close":
            await router.call.done_writing()
            assert await router.call.code() is grpc.StatusCode.OK
    began = time.monotonic()
    assert idle(await load(ready, idle))
    assert time.monotonic() - began < 2.0


@pytest.mark.asyncio
async def test_drain_waits_refuses_and_cancels_what_is_late(start: Callable[..., WorkerReady]) -> None:
    ready = start(simulated_step_ms=2.0)
    async with session(ready) as router, grpc.aio.insecure_channel(ready.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert await stub.Drain(pb.DrainRequest(epoch=9)).code() is grpc.StatusCode.FAILED_PRECONDITION
        await router.submit(1, [1, 2, 3], max_tokens=40)
        await router.submit(2, [1, 2, 3], max_tokens=2000)
        await router.until(lambda: bool(router.tokens.get(2)))
        drain = asyncio.ensure_future(stub.Drain(pb.DrainRequest(epoch=ready.epoch, deadline_ms=500)))
        await router.until(lambda: bool(router.loads) and router.loads[-1].draining)
        await router.submit(3, [1, 2, 3])
        await router.ended(1, 2, 3)
        answer = await drain
        assert (answer.finished, answer.cancelled) == (1, 1)
        assert [router.ends[i].finish for i in (1, 2, 3)] == [pb.FINISH_LENGTH, pb.FINISH_CANCELLED, pb.FINISH_REJECTED]
        assert router.ends[3].reason == "DRAINING"
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING


def forked(seeds: list[int]) -> dict[str, Any]:
    sampling = pb.SamplingParams(max_tokens=8, top_p=1.0, temperature=1.0, seed=50)
    return {"sampling": sampling, "forks": [pb.Fork(sequence=seed, seed=seed) for seed in seeds]}


@pytest.mark.asyncio
async def test_n_answers_are_n_sequences_with_one_admission(start: Callable[..., WorkerReady]) -> None:
    ready = start()
    prompt = list(range(100, 150))
    async with session(ready) as router:
        await router.submit(50, prompt, **forked([51, 52]))
        await router.ended(50, 51, 52)
        assert set(router.admissions) == {50}
        assert len({tuple(router.tokens[i]) for i in (50, 51, 52)}) == 3
        await router.submit(60, prompt, **forked([61]))
        await router.send(cancel=pb.Cancel(sequence=61))
        await router.ended(60, 61)
        assert router.tokens[60] == router.tokens[50]
        for number, bad in enumerate(([71, 71], [70], [72, 80]), 70):
            if 80 in bad:
                await router.submit(80, prompt, max_tokens=1900)
            await router.submit(70, prompt, **forked(bad))
            await router.ended(*({70, *bad} - {80}))
            assert router.ends.pop(70).reason == "MALFORMED", number
            router.tokens.pop(70)
            for other in {*bad} - {70, 80}:
                assert router.ends.pop(other).reason == "MALFORMED"
        await router.submit(90, [*prompt, 5], num_prompt_tokens=50, **forked([91]))
        await router.ended(90, 91)
        assert {router.ends[i].reason for i in (90, 91)} == {"MALFORMED"}
    assert idle(await load(ready, idle))


SHARED, PUBLISHER = b"p" * 16, b"o" * 16
REGIONS = [pb.Region(scope_root=SHARED, end=64, owner=PUBLISHER), pb.Region(scope_root=PUBLISHER)]


def pin(**fields: Any) -> pb.Pin:
    quota = pb.Quota(device_floor=4, pinned=4, device_ceiling=100)
    return pb.Pin(
        **({"prefix": b"n" * 16, "regions": REGIONS, "token_ids": range(64), "ttl_ms": 60_000, "quota": quota} | fields)
    )


@pytest.mark.asyncio
async def test_a_pinned_prefix_stays_for_its_time_or_until_unpinned(start: Callable[..., WorkerReady]) -> None:
    ready = start()

    def holds(blocks: int) -> Callable[[pb.Load], bool]:
        return lambda load: load.device_blocks - load.free_blocks - load.cached_blocks == blocks

    async with session(ready) as router:
        await router.submit(1, [*range(64), 7], max_tokens=1, regions=REGIONS, quota=pb.Quota())
        await router.ended(1)
        for wrong in ({"prefix": b"short"}, {"token_ids": [9999]}, {"token_ids": []}, {"regions": []}):
            await router.send(pin=pin(**wrong))
        await router.send(pin=pin())
        await load(ready, holds(4))
    await load(ready, holds(4))
    async with session(ready) as router:
        await router.send(unpin=pb.Unpin(prefix=b"n" * 16))
        await load(ready, holds(0))
        await router.send(pin=pin(ttl_ms=1))
        await router.send(unpin=pb.Unpin(prefix=b"u" * 16))
        await load(ready, holds(0))
    assert idle(await load(ready, idle))


def keys(router: Client, kind: type) -> set[bytes]:
    return {key for batch in router.batches for event in batch.events if isinstance(event, kind) for key in event.keys}


@pytest.mark.asyncio
async def test_a_purge_says_by_count_what_it_forgot_and_ends_what_runs(
    start: Callable[..., WorkerReady], redis_url: str
) -> None:
    ready = start(redis=redis_url)
    async with session(ready) as router, grpc.aio.insecure_channel(ready.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        await router.send(follow=pb.Follow())
        await router.submit(1, [*range(64), 7], max_tokens=1, regions=REGIONS)
        await router.ended(1)
        await router.send(pin=pin())
        await router.submit(2, list(range(500, 520)), max_tokens=1900, regions=[pb.Region(scope_root=PUBLISHER)])
        await router.until(lambda: bool(router.tokens.get(2)))
        answer = await stub.Purge(pb.PurgeRequest(roots=[PUBLISHER, SHARED]), timeout=5)
        await router.ended(2)
        assert router.ends[2].finish == pb.FINISH_CANCELLED
        assert answer.device_blocks >= 5
        assert (answer.cpu_blocks, answer.remaining) == (0, 0)
        await load(ready, lambda load: load.free_blocks == 256)
        assert await stub.Purge(pb.PurgeRequest(roots=[PUBLISHER]), timeout=5) == pb.PurgeResponse()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.Purge(pb.PurgeRequest(roots=[b"short"]), timeout=5)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await router.until(lambda: keys(router, BlocksStored) == keys(router, BlocksRemoved))


@pytest.mark.asyncio
async def test_the_cpu_tier_gives_back_what_left_the_device(start: Callable[..., WorkerReady], redis_url: str) -> None:
    more = {"max_model_len": 1024, "simulated_prefill_tokens_per_s": 5e4, "redis": redis_url}
    ready = start(cpu_blocks=512, device_blocks=64, **more)
    prompts = [[i + 5, *range(100, 500)] for i in range(6)]
    async with session(ready) as router:
        await router.send(follow=pb.Follow())
        for sequence, prompt in enumerate([*prompts, *prompts]):
            await router.submit(sequence, prompt)
            await router.ended(sequence)
        assert [router.tokens[i] for i in range(6)] == [router.tokens[6 + i] for i in range(6)]
        assert all(router.admissions[6 + i].cached_cpu_tokens >= 300 for i in range(6))
        assert all(router.admissions[i].cached_cpu_tokens == 0 for i in range(6))
        await router.until(lambda: router.batches[-1].seq == stream(redis_url)[-1].seq)
        index = MemoryIndex()
        for batch in router.batches:
            index.apply(batch.worker, batch.epoch, batch.events)
        found = index.match(block_keys((Region(ScopeRoot(ROOT), None),), array("I", prompts[0]), 16))
        assert found["worker-0"].cpu_blocks >= 20
        async with grpc.aio.insecure_channel(ready.address) as channel:
            stub = worker_pb2_grpc.WorkerLinkStub(channel)
            answer = await stub.Purge(pb.PurgeRequest(roots=[ROOT]), timeout=5)
        assert answer.cpu_blocks >= 6 * 20
    await load(ready, lambda load: load.free_blocks == 64)


@pytest.mark.asyncio
async def test_a_window_lets_an_answer_outgrow_the_pool(start: Callable[..., WorkerReady]) -> None:
    attention = {"window": 64, "sinks": 4}
    ready = start(**attention, device_blocks=128, max_model_len=0, simulated_step_ms=0.0)
    async with session(ready, key_fingerprint=fingerprint(**attention)) as router:
        assert router.hello.max_model_len == 1 << 30
        await router.submit(1, list(range(100, 150)), max_tokens=4000)
        await router.ended(1)
        assert len(router.tokens[1]) == 4000
        await router.submit(2, list(range(100, 150)), max_tokens=(1 << 30) - 50)
        await router.until(lambda: len(router.tokens.get(2, [])) > 500)
        assert router.tokens[2][:500] == router.tokens[1][:500]
        await router.send(cancel=pb.Cancel(sequence=2))
        await router.ended(2)


@pytest.mark.asyncio
async def test_a_quota_that_makes_no_sense_is_malformed(start: Callable[..., WorkerReady]) -> None:
    async with session(start()) as router:
        await router.submit(1, [5, 6], quota=pb.Quota(device_floor=5, device_ceiling=4))
        await router.submit(2, [5, 6], regions=[pb.Region(scope_root=ROOT, owner=b"short")])
        await router.ended(1, 2)
        assert {router.ends[i].reason for i in (1, 2)} == {"MALFORMED"}


@pytest.mark.asyncio
async def test_a_slow_reader_gets_merged_outputs(start: Callable[..., WorkerReady]) -> None:
    ready = start(simulated_step_ms=0.0, max_model_len=8192, device_blocks=600)
    async with session(ready) as router:
        for i in range(32):
            await router.submit(i, [i + 3, 2, 3], max_tokens=200)
        await asyncio.sleep(1.0)
        await router.ended(*range(32))
        assert all(len(tokens) == 200 for tokens in router.tokens.values())


@pytest.mark.asyncio
async def test_a_thousand_requests_with_cancels_leave_nothing_behind(start: Callable[..., WorkerReady]) -> None:
    ready = start(simulated_step_ms=0.0, max_sequences=16)
    rng = random.Random(1)
    before = len(os.listdir("/proc/self/fd"))
    async with session(ready) as router:
        ended = 0
        for i in range(1000):
            head = [rng.randrange(3)] * 64
            await router.submit(i, head + [rng.randrange(4000) for _ in range(40)], max_tokens=rng.randrange(1, 20))
            if rng.random() < 0.1:
                await router.send(cancel=pb.Cancel(sequence=rng.randrange(max(0, i - 31), i + 1)))
            if i - ended >= 31:
                ended += 1
                await router.ended(ended - 1)
        await router.ended(*range(1000))
        finishes = [router.ends[i].finish for i in range(1000)]
        assert set(finishes) == {pb.FINISH_LENGTH, pb.FINISH_CANCELLED}
    assert idle(await load(ready, idle))
    await eventually(lambda: len(os.listdir("/proc/self/fd")) <= before + 2)


async def leases(url: str) -> dict[str, Lease]:
    async with redis.asyncio.Redis.from_url(url) as client:
        return {**(await view_leases(client, "pando")).leases}


def stream(url: str) -> list[Any]:
    with redis.Redis.from_url(url) as client:
        return [decode(fields[b"b"]) for _, fields in client.xrange("pando:{worker-0}:events")]


async def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.asyncio
async def test_lease_and_events_are_in_redis_and_on_the_link(start: Callable[..., WorkerReady], redis_url: str) -> None:
    ready = start(redis=redis_url)
    lease = (await leases(redis_url))["worker-0"]
    assert (lease.address, lease.epoch, lease.pid, lease.device_blocks) == (ready.address, 1, os.getpid(), 256)
    assert lease.key_fingerprint == fingerprint()
    prompt = list(range(100, 164))
    expected = block_keys((Region(ScopeRoot(ROOT), None),), array("I", prompt), 16)
    async with session(ready) as router:
        before = stream(redis_url)[-1].seq
        await router.send(follow=pb.Follow(seq=before))
        await router.submit(1, prompt, max_tokens=4)
        await router.ended(1)
        await router.until(lambda: bool(router.batches))
        assert router.batches == stream(redis_url)[-1:] and router.batches[0].seq == before + 1
    found = [event.keys for batch in router.batches for event in batch.events if isinstance(event, BlocksStored)]
    assert found == [expected]

    def stored() -> list[bytes]:
        return [key for batch in stream(redis_url)[1:] for event in batch.events for key in event.keys]

    await eventually(lambda: stored() == expected)
    assert stream(redis_url)[-1].worker == "worker-0"
    start.process.stop()  # type: ignore[attr-defined]
    assert not await leases(redis_url)


@pytest.mark.asyncio
async def test_a_newer_life_fences_the_older_one(start: Callable[..., WorkerReady], redis_url: str) -> None:
    start(redis=redis_url)
    older = start.process  # type: ignore[attr-defined]
    newer = start(redis=redis_url)
    assert newer.epoch == 2
    assert await asyncio.to_thread(older.wait, 5.0)
    assert "newer life" in older.failure
    assert (await leases(redis_url))["worker-0"].address == newer.address


@pytest.mark.asyncio
async def test_redis_may_go_and_come_back_empty(start: Callable[..., WorkerReady], own_redis: Any) -> None:
    ready = start(redis=own_redis.url, heartbeat_s=0.1, lease_ttl_s=1.0)
    async with session(ready) as router:
        own_redis.stop()
        await asyncio.sleep(0.3)
        await router.submit(1, list(range(100, 164)), max_tokens=4)
        await router.ended(1)
        own_redis.start()

        def back() -> bool:
            with redis.Redis.from_url(own_redis.url) as client:
                return client.exists("pando:{worker-0}:lease") == 1 and bool(client.keys("*:set:*"))

        await eventually(back)
    lease = (await leases(own_redis.url))["worker-0"]
    assert (lease.epoch, lease.num_blocks) == (ready.epoch, 2 + 4), "two are planted"


def test_a_port_that_is_taken_is_one_error_and_leaves_nothing(
    start: Callable[..., WorkerReady], redis_url: str
) -> None:
    ready = start()
    port = int(ready.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot listen on"):
        start(worker_port=port, redis=redis_url)
    with redis.Redis.from_url(redis_url) as client:
        assert not client.exists("pando:{worker-0}:lease")


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "metadata",
    [(), bearer("wrong"), bearer("s3cre"), bearer("s3cret") * 2, (("authorization", "s3cret"),)],
    ids=["none", "wrong", "shorter", "twice", "no bearer"],
)
async def test_nothing_is_done_for_who_has_not_the_link_token(
    start: Callable[..., WorkerReady], metadata: tuple[tuple[str, str], ...]
) -> None:
    ready = start(link_token="s3cret")
    async with grpc.aio.insecure_channel(ready.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        calls = [
            stub.Drain(pb.DrainRequest(epoch=ready.epoch), metadata=metadata),
            stub.FetchBlocks(pb.FetchBlocksRequest(epoch=ready.epoch), metadata=metadata),
            stub.Session(metadata=metadata),  # refused before a hello
            health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata),
        ]
        async with asyncio.timeout(2.0):
            assert [await call.code() for call in calls] == [grpc.StatusCode.UNAUTHENTICATED] * 4
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, "it was drained"


@pytest.mark.asyncio
@pytest.mark.parametrize("token", ["s3cret", "", "another"])
async def test_a_router_with_the_link_token_gets_a_session(start: Callable[..., WorkerReady], token: str) -> None:
    ready = start(link_token="s3cret")
    link = WorkerLink(
        ready.address,
        router="r",
        expected=WorkerHello("worker-0", ready.epoch, 16, fingerprint()),
        token=token,
    )
    link.start()
    await eventually(lambda: link.live or "refused" in link.reason)
    assert link.live == (token == "s3cret")
    assert link.live or link.reason == "refused by the worker: the link token is not valid"
    await link.stop()


@pytest.mark.asyncio
async def test_who_has_the_link_token_may_drain(start: Callable[..., WorkerReady]) -> None:
    ready = start(link_token="s3cret")
    async with grpc.aio.insecure_channel(ready.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        await stub.Drain(pb.DrainRequest(epoch=ready.epoch), metadata=bearer("s3cret"))
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-such-option"],
        ["--host", "0.0.0.0"],
        ["--link-token", "with space"],
        ["--runner", "model", "--model", "/nowhere"],
        ["--redis", "redis://127.0.0.1:1/0"],
        ["--cpu-blocks=-5"],
        ["--sinks", "4"],
        ["--block-size", "0"],
        ["--max-model-len", "999999"],
    ],
)
def test_a_bad_start_is_one_line_and_exit_code_2(flags: list[str]) -> None:
    simulated = [] if "--runner" in flags else ["--runner", "simulated", "--model", "nobody/simulated"]
    done = subprocess.run(
        [sys.executable, "-m", "worker", *simulated, *flags], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_the_command_serves_until_a_signal_and_never_loads_torch(free_port: Callable[[], int]) -> None:
    metrics = free_port()
    program = (
        "import sys, atexit\n"
        "from worker.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit(70 if 'torch' in sys.modules else code)\n"
    )
    flags = ["--runner", "simulated", "--model", "nobody/simulated", "--json", "--worker-metrics-port", str(metrics)]
    child = subprocess.Popen([sys.executable, "-c", program, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert (ready["worker_id"], ready["epoch"], ready["pid"]) == ("worker-0", 1, child.pid)
        page = urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=5).read().decode()
        assert "pando_num_requests_running" in page
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=10)
        assert child.returncode == 0, errors
    finally:
        child.kill()
        child.communicate()
