"""KV blocks from one worker to another over real gRPC: bit-equal, exact, in time or not at all, never a wrong token."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from pando.settings import WorkerSettings
from pando.worker.v1 import worker_pb2 as pb
from pando.worker.v1 import worker_pb2_grpc
from tests.service.test_worker_link import BASE, ROOT, Client
from worker.process import WorkerProcess, WorkerReady

pytestmark = pytest.mark.asyncio

OTHER, SHARED, PUBLISHER = (name * 16 for name in (b"o", b"s", b"p"))
SIZE = 16
Start = Callable[..., WorkerReady]


def prompt(length: int, seed: int = 0, vocab: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(length)]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts workers with a CPU tier; they are stopped at the end."""
    processes: list[WorkerProcess] = []

    def run(**changes: Any) -> WorkerReady:
        base = BASE | {"cpu_blocks": 256, "worker_id": f"w{len(processes)}", "host": "127.0.0.1"}
        base["simulated_prefill_tokens_per_s"] = 5e3  # else few blocks are computed sooner than loaded
        process = WorkerProcess(WorkerSettings(**(base | changes)))
        processes.append(process)
        run.processes = processes  # type: ignore[attr-defined]
        return process.start()

    yield run
    for process in processes:
        process.stop()


@asynccontextmanager
async def session(ready: WorkerReady, start: Start) -> AsyncIterator[Client]:
    identity = next(p for p in start.processes if p._settings.worker_id == ready.worker_id)._server._identity  # type: ignore[attr-defined]
    async with grpc.aio.insecure_channel(ready.address) as channel:
        client = Client(worker_pb2_grpc.WorkerLinkStub(channel).Session())
        await client.send(
            hello=pb.RouterHello(router="r", key_fingerprint=identity.key_fingerprint, epoch=identity.epoch)
        )
        yield client


def pull(source: WorkerReady, num_blocks: int, timeout_ms: int = 5000) -> pb.Pull:
    return pb.Pull(address=source.address, epoch=source.epoch, num_blocks=num_blocks, timeout_ms=timeout_ms)


async def run(client: Client, number: int, tokens: list[int], **fields: Any) -> list[int]:
    await client.submit(number, tokens, **fields)
    await client.ended(number)
    return client.tokens[number]


def fingerprint_of(start: Start) -> str:
    return start.processes[0]._server._identity.key_fingerprint  # type: ignore[attr-defined, no-any-return]


async def test_a_head_comes_from_the_peer_and_is_not_computed(start: Start) -> None:
    one, other = start(), start()
    tokens = prompt(20 * SIZE + 5)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        assert await run(at_other, 1, tokens, pull=pull(one, 20)) == expected
        admission = at_other.admissions[1]
        assert (admission.cached_remote_tokens, admission.cached_cpu_tokens) == (20 * SIZE, 0)
        assert (admission.pulled_tokens, admission.peer_lacks) == (20 * SIZE, False) and admission.pull_ms > 0
        again = await run(at_other, 2, tokens)
        assert again == expected and at_other.admissions[2].cached_device_tokens >= 20 * SIZE


@pytest.mark.parametrize("policy", ["slru", "fifo"])
async def test_both_tiers_evict_as_the_settings_say(start: Start, policy: str) -> None:
    start(eviction=policy)
    tiers = start.processes[0]._engine._store  # type: ignore[attr-defined]
    assert (tiers.device.policy, tiers.cpu.policy) == (policy, policy)


async def test_only_what_is_missing_is_fetched(start: Start) -> None:
    one, other = start(), start()
    tokens = prompt(20 * SIZE + 5)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        await run(at_other, 1, tokens[: 8 * SIZE + 1], max_tokens=1)
        assert await run(at_other, 2, tokens, pull=pull(one, 20)) == expected
        admission = at_other.admissions[2]
        assert (admission.cached_device_tokens, admission.cached_remote_tokens) == (8 * SIZE, 12 * SIZE)


async def test_another_scope_gets_nothing(start: Start) -> None:
    one, other = start(), start()
    tokens = prompt(10 * SIZE + 5)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        regions = [pb.Region(scope_root=OTHER)]
        assert await run(at_other, 1, tokens, pull=pull(one, 10), regions=regions) == expected
        admission = at_other.admissions[1]
        assert (admission.cached_remote_tokens, admission.pulled_tokens, admission.peer_lacks) == (0, 0, True)


async def test_siblings_have_their_head_fetched_once(start: Start) -> None:
    one, other = start(), start()
    head = prompt(20 * SIZE)
    async with session(one, start) as at_one, session(other, start) as at_other:
        await run(at_one, 0, head)
        prompts = {number: head + prompt(30, seed=number) for number in range(1, 5)}
        expected = {number: await run(at_one, number, tokens) for number, tokens in prompts.items()}
        for number, tokens in prompts.items():
            await at_other.submit(number, tokens, pull=pull(one, 20))
        await at_other.ended(*prompts)
        assert {number: at_other.tokens[number] for number in prompts} == expected
        assert sorted(a.pulled_tokens for a in at_other.admissions.values()) == [0, 0, 0, 20 * SIZE]
        tiers = start.processes[1]._engine._store  # type: ignore[attr-defined]
        assert tiers.counts.received == 20


@pytest.mark.parametrize("what", ["nobody there", "another epoch", "no time", "no tier"])
async def test_what_does_not_come_is_computed(start: Start, what: str, free_port: Callable[[], int]) -> None:
    one = start(**({"cpu_blocks": 0} if what == "no tier" else {}))
    other = start()
    tokens = prompt(20 * SIZE + 5)
    order = pull(one, 20, timeout_ms=1 if what == "no time" else 1000)
    if what == "nobody there":
        order.address = f"127.0.0.1:{free_port()}"
    elif what == "another epoch":
        order.epoch += 1
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        began = time.monotonic()
        assert await run(at_other, 1, tokens, pull=order) == expected
        assert time.monotonic() - began < 5
        if what != "no time":
            assert at_other.admissions[1].cached_remote_tokens == 0
        store = start.processes[1]._engine._store  # type: ignore[attr-defined]
        await asyncio.sleep(0.1)
        assert store.cpu.num_referenced == 0


async def test_a_peer_that_dies_in_the_middle_costs_what_was_missing(start: Start) -> None:
    """A stand-in for the peer sends three good blocks, then breaks off; another flips a byte, another repeats one."""
    one, other = start(), start()
    tokens = prompt(10 * SIZE + 5)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        for number, fault in enumerate(("breaks off", "flips a byte", "repeats"), start=1):
            tokens_now = tokens if number == 1 else prompt(10 * SIZE + 5, seed=number)
            wanted = expected if number == 1 else await run(at_one, number, tokens_now)
            async with faulty(one, fault, good=3) as address:
                order = pull(one, 10)
                order.address = address
                assert await run(at_other, number, tokens_now, pull=order) == wanted
            assert at_other.admissions[number].cached_remote_tokens == 3 * SIZE


async def test_a_request_may_be_cancelled_while_its_blocks_come(start: Start) -> None:
    one, other = start(), start()
    async with silent() as address, session(other, start) as at_other:
        order = pull(one, 10, timeout_ms=20_000)
        order.address = address
        await at_other.submit(1, prompt(10 * SIZE + 5), pull=order, forks=[pb.Fork(sequence=2, seed=1)])
        await asyncio.sleep(0.2)
        await at_other.send(cancel=pb.Cancel(sequence=1))
        await at_other.ended(1)
        assert at_other.ends[1].finish == pb.FINISH_CANCELLED
        await at_other.send(cancel=pb.Cancel(sequence=2))
        await at_other.ended(2)
        assert at_other.ends[2].finish == pb.FINISH_CANCELLED
        assert start.processes[1]._engine._store.cpu.num_referenced == 0  # type: ignore[attr-defined]


async def test_one_of_many_answers_may_be_cancelled_while_their_blocks_come(start: Start) -> None:
    """Whichever it is ends at once; for the others the blocks come still."""
    one, other = start(), start()
    tokens = prompt(10 * SIZE + 5)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 0, tokens)
        for number in (1, 2, 3):
            shut = Gate(start.processes[1]._runner.mover)  # type: ignore[attr-defined]
            forks = [pb.Fork(sequence=10 * number + at, seed=0) for at in (2, 3)]
            regions = [pb.Region(scope_root=bytes([number]) * 16)]
            await run(at_one, 100 + number, tokens, regions=regions)
            await at_other.submit(10 * number + 1, tokens, pull=pull(one, 10), forks=forks, regions=regions)
            await asyncio.to_thread(shut.reached.wait, 10)
            await at_other.send(cancel=pb.Cancel(sequence=10 * number + number))
            await at_other.ended(10 * number + number)
            assert at_other.ends[10 * number + number].finish == pb.FINISH_CANCELLED
            shut.open.set()
            left = [10 * number + at for at in (1, 2, 3) if at != number]
            await at_other.ended(*left)
            assert [at_other.tokens[at] for at in left] == [expected, expected]
            assert sum(at_other.admissions[at].pulled_tokens for at in left if at in at_other.admissions) == 10 * SIZE
        assert start.processes[1]._engine._store.cpu.num_referenced == 0  # type: ignore[attr-defined]


class Gate:
    """Keeps the writes of a mover waiting until it is opened; what was written is as it would have been."""

    def __init__(self, mover: Any) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        write = type(mover).write

        def held(row: int, payload: bytes) -> Future[bool]:
            self.reached.set()
            done: Future[bool] = Future()

            def finish() -> None:
                self.open.wait(20)
                write(mover, row, payload).add_done_callback(lambda inner: done.set_result(inner.result()))

            threading.Thread(target=finish, daemon=True).start()
            return done

        mover.write = held


async def test_a_head_that_was_fetched_is_its_publishers(start: Start) -> None:
    """Also where it comes before anything else of that publisher: its purge finds it."""
    one, other = start(), start()
    tokens = prompt(10 * SIZE + 5)
    regions = [pb.Region(scope_root=SHARED, end=6 * SIZE, owner=PUBLISHER), pb.Region(scope_root=ROOT)]
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens, regions=regions)
        assert await run(at_other, 1, tokens, regions=regions, pull=pull(one, 10)) == expected
        assert at_other.admissions[1].cached_remote_tokens == 10 * SIZE
        assert start.processes[1]._engine._store.cpu.account(PUBLISHER).charge == 6  # type: ignore[attr-defined]
        answer = await purge(other, PUBLISHER, SHARED)
        assert (answer.cpu_blocks, answer.remaining) == (10, 0)
        assert await run(at_other, 2, tokens, regions=regions) == expected
        assert at_other.admissions[2].cached_device_tokens + at_other.admissions[2].cached_cpu_tokens == 0


async def test_a_purge_ends_those_whose_blocks_are_on_their_way(start: Start) -> None:
    other = start()
    async with silent() as address, session(other, start) as at_other:
        order = pull(other, 10, timeout_ms=20_000)
        order.address = address
        for number, root in ((1, ROOT), (2, OTHER)):
            regions = [pb.Region(scope_root=root)]
            await at_other.submit(number, prompt(10 * SIZE + 5, seed=number), pull=order, regions=regions)
        await asyncio.sleep(0.2)
        await purge(other, ROOT)
        await at_other.ended(1)
        assert (at_other.ends[1].finish, at_other.ends[1].reason) == (pb.FINISH_CANCELLED, "PURGED")
        assert 2 not in at_other.ends


async def test_a_defect_here_is_not_told_to_a_peer(start: Start) -> None:
    def read(block_id: int) -> bytes:
        raise RuntimeError("what nobody outside has to know")

    one = start()
    tokens = prompt(4 * SIZE)
    async with session(one, start) as at_one:
        await run(at_one, 1, tokens)
    start.processes[0]._runner.mover.read = read  # type: ignore[attr-defined]
    async with grpc.aio.insecure_channel(one.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await fetched(worker_pb2_grpc.WorkerLinkStub(channel), request(one, fingerprint_of(start), tokens))
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert failed.value.details() == "internal error"


@pytest.mark.timeout(40)
async def test_a_peer_that_reads_too_slowly_gets_what_went_in_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream ends as one that has no more, and nothing is held for it."""
    monkeypatch.setattr("worker.server.EXPORT_TIMEOUT_S", 0.5)
    one = start(simulated_block_bytes=1 << 20)
    kind = start.processes[0]._runner.mover.payload_format  # type: ignore[attr-defined]
    tokens = prompt(40 * SIZE)
    async with session(one, start) as at_one:
        await run(at_one, 1, tokens)
    async with grpc.aio.insecure_channel(one.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        call = stub.FetchBlocks(request(one, fingerprint_of(start), tokens, kind))
        first = await call.read()
        await asyncio.sleep(2.0)
        last = first
        while (chunk := await call.read()) is not grpc.aio.EOF:
            last = chunk
        assert await call.code() is grpc.StatusCode.OK
        assert first.index == 0 and last.index < 39
    assert start.processes[0]._engine._store.cpu.num_referenced == 0  # type: ignore[attr-defined]


async def test_a_drain_waits_for_no_blocks(start: Start) -> None:
    other = start()
    async with silent() as address, session(other, start) as at_other:
        order = pull(other, 10, timeout_ms=20_000)
        order.address = address
        await at_other.submit(1, prompt(10 * SIZE + 5), pull=order)
        await asyncio.sleep(0.2)
        async with grpc.aio.insecure_channel(other.address) as channel:
            stub = worker_pb2_grpc.WorkerLinkStub(channel)
            drained = await stub.Drain(pb.DrainRequest(epoch=other.epoch, deadline_ms=10_000), timeout=15)
        await at_other.ended(1)
        assert (drained.finished, at_other.ends[1].finish) == (1, pb.FINISH_LENGTH)


async def purge(ready: WorkerReady, *roots: bytes) -> pb.PurgeResponse:
    async with grpc.aio.insecure_channel(ready.address) as channel:
        answer = await worker_pb2_grpc.WorkerLinkStub(channel).Purge(pb.PurgeRequest(roots=roots), timeout=5)
        assert isinstance(answer, pb.PurgeResponse)
        return answer


async def test_a_peer_is_asked_for_what_only_it_may_know(start: Start) -> None:
    """Without the token nothing is answered; a request that makes no sense, or means another model, is refused."""
    guarded = start(link_token="secret")
    async with grpc.aio.insecure_channel(guarded.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fetched(stub, pb.FetchBlocksRequest(epoch=guarded.epoch))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    plain = start()
    good = request(plain, fingerprint_of(start), prompt(SIZE))
    async with grpc.aio.insecure_channel(plain.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fetched(stub, good)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        for change in (
            {"epoch": plain.epoch + 1},
            {"key_fingerprint": "x"},
            {"payload_format": "x"},
            {"token_ids": []},
            {"regions": []},
        ):
            bad = pb.FetchBlocksRequest()
            bad.CopyFrom(good)
            for name, value in change.items():
                bad.ClearField(name)  # type: ignore[arg-type]
                if value:
                    setattr(bad, name, value)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await fetched(stub, bad)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.timeout(120)
async def test_a_models_blocks_are_bit_equal(start: Start) -> None:
    changes = {"runner": "model", "model": "pando-tiny", "device_blocks": 64, "cpu_blocks": 64, "max_model_len": 1024}
    one, other = start(**changes), start(**changes)
    tokens = prompt(12 * SIZE + 3, vocab=2000)
    async with session(one, start) as at_one, session(other, start) as at_other:
        expected = await run(at_one, 1, tokens)
        wanted = request(one, fingerprint_of(start), tokens, payload_format=payload_format(start))
        async with grpc.aio.insecure_channel(one.address) as channel:
            sent = await fetched(worker_pb2_grpc.WorkerLinkStub(channel), wanted)
        assert await run(at_other, 1, tokens, pull=pull(one, 12)) == expected
        assert at_other.admissions[1].cached_remote_tokens == 12 * SIZE
        wanted.epoch = other.epoch
        async with grpc.aio.insecure_channel(other.address) as channel:
            kept = await fetched(worker_pb2_grpc.WorkerLinkStub(channel), wanted)
        assert len(sent) == 12 and kept == sent


# Stand-ins for a peer


def payload_format(start: Start) -> str:
    return str(start.processes[0]._runner.mover.payload_format)  # type: ignore[attr-defined]


def request(
    ready: WorkerReady, fingerprint: str, tokens: list[int], payload_format: str = f"simulated {SIZE}"
) -> pb.FetchBlocksRequest:
    return pb.FetchBlocksRequest(
        epoch=ready.epoch,
        key_fingerprint=fingerprint,
        payload_format=payload_format,
        regions=[pb.Region(scope_root=ROOT)],
        token_ids=tokens,
        count=100,
    )


async def fetched(stub: Any, wanted: pb.FetchBlocksRequest) -> list[bytes]:
    """Whole payloads, in order."""
    found: list[bytes] = []
    part = b""
    async for chunk in stub.FetchBlocks(wanted):
        part += chunk.payload
        if chunk.HasField("checksum"):
            found.append(part)
            part = b""
    return found


class _Faulty(worker_pb2_grpc.WorkerLinkServicer):
    def __init__(self, stub: Any, fault: str, good: int) -> None:
        self._stub = stub
        self._fault = fault
        self._good = good

    async def FetchBlocks(self, request: Any, context: Any) -> None:
        chunks = [chunk async for chunk in self._stub.FetchBlocks(request)]
        for chunk in chunks[: self._good]:
            await context.write(chunk)
        if self._fault == "breaks off":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        for chunk in chunks[self._good - 1 :] if self._fault == "repeats" else chunks[self._good :]:
            if self._fault == "flips a byte":
                chunk.payload = bytes([chunk.payload[0] ^ 1]) + chunk.payload[1:]
            await context.write(chunk)


@asynccontextmanager
async def faulty(source: WorkerReady, fault: str, good: int) -> AsyncIterator[str]:
    server = grpc.aio.server()
    async with grpc.aio.insecure_channel(source.address) as channel:
        stub = worker_pb2_grpc.WorkerLinkStub(channel)
        worker_pb2_grpc.add_WorkerLinkServicer_to_server(_Faulty(stub, fault, good), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(0)


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """Takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"
