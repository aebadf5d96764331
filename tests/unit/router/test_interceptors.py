"""How long the gate waits for a client that does not read, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import pytest

from kvstore.scope import TenantId
from router.interceptors import Gate, GateLimits
from router.tenants import Tenant

pytestmark = pytest.mark.asyncio

METHOD = "/pando.v1.Inference/GenerateStream"
SLOW_S = 30.0


class Clock:
    """The event loop's time, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: self.now)

    async def go_on(self, seconds: float) -> None:
        """Let time pass, and everything happen that is due then."""
        self.now += seconds
        for _ in range(20):
            await asyncio.sleep(0)


class Reader:
    """A client: what it was sent; it takes messages while `reads` is set."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self._messages = iter([b"", grpc.aio.EOF])

    async def read(self) -> object:
        return next(self._messages)

    async def write(self, message: bytes) -> None:
        await self.reads.wait()
        self.taken.append(message)

    async def abort(self, code: grpc.StatusCode, words: str, metadata: object) -> None:
        self.refusal = code, words

    def time_remaining(self) -> None:
        return None

    def done(self) -> bool:
        return False


class Answer:
    """A handler whose messages the test hands out; `closed` once nobody wants more."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.closed = False

    async def stream(self, request: bytes, call: object) -> AsyncGenerator[bytes, None]:
        try:
            while (message := await self.messages.get()) is not None:
                yield message
        finally:
            self.closed = True

    async def one(self, request: bytes, call: object) -> bytes | None:
        return await self.messages.get()


async def begin(answer: Answer, reader: Reader, *, unary: bool = False) -> asyncio.Task[None]:
    """A call of `reader` behind the gate."""
    gate = Gate(lambda method, metadata: Tenant(TenantId("a")), GateLimits(request_s=1000.0, slow_reader_s=SLOW_S))
    make: Callable[..., Any] = grpc.unary_unary_rpc_method_handler if unary else grpc.unary_stream_rpc_method_handler
    handler = make(answer.one if unary else answer.stream, lambda raw: raw, lambda message: message)

    async def found(details: object) -> Any:
        return handler

    class Details:
        method = METHOD
        invocation_metadata = ()

    gated: Any = await gate.intercept_service(found, Details)  # type: ignore[arg-type]
    return asyncio.create_task(gated.stream_stream(None, reader))


async def test_a_client_that_does_not_read_is_refused_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answer, reader = Clock(monkeypatch), Answer(), Reader()
    call = await begin(answer, reader)
    answer.messages.put_nowait(b"a")
    await clock.go_on(SLOW_S / 2)
    reader.reads.clear()
    answer.messages.put_nowait(b"b")
    await clock.go_on(0)
    # Its time runs from the message that it leaves, not from an earlier one.
    await clock.go_on(SLOW_S - 1)
    assert not call.done() and not answer.closed
    await clock.go_on(1)
    assert call.done() and answer.closed
    assert reader.refusal == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the client reads too slowly")
    assert reader.taken == [b"a"]


async def test_each_message_has_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answer, reader = Clock(monkeypatch), Answer(), Reader()
    call = await begin(answer, reader)
    for number in range(5):
        reader.reads.clear()
        answer.messages.put_nowait(b"%d" % number)
        await clock.go_on(0)
        await clock.go_on(SLOW_S * 0.9)
        reader.reads.set()
        await clock.go_on(0)
    answer.messages.put_nowait(None)
    await clock.go_on(0)
    assert call.done() and reader.refusal is None
    assert reader.taken == [b"0", b"1", b"2", b"3", b"4"]


async def test_an_answer_that_pauses_is_not_a_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answer, reader = Clock(monkeypatch), Answer(), Reader()
    call = await begin(answer, reader)
    for message in (b"a", b"b", None):
        answer.messages.put_nowait(message)
        await clock.go_on(0)
        await clock.go_on(3 * SLOW_S)
    assert call.done() and reader.refusal is None and reader.taken == [b"a", b"b"]


@pytest.mark.parametrize("reads", [True, False])
async def test_a_cancelled_call_ends_at_once_and_is_no_slow_reader(
    monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    clock, answer, reader = Clock(monkeypatch), Answer(), Reader()
    call = await begin(answer, reader)
    answer.messages.put_nowait(b"a")
    await clock.go_on(0)
    if not reads:
        reader.reads.clear()
        answer.messages.put_nowait(b"b")
        await clock.go_on(0)
    call.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call
    assert call.cancelled() and answer.closed
    await clock.go_on(2 * SLOW_S)
    assert reader.refusal is None


async def test_the_one_message_of_an_answer_has_its_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, answer, reader = Clock(monkeypatch), Answer(), Reader()
    reader.reads.clear()
    call = await begin(answer, reader, unary=True)
    answer.messages.put_nowait(b"a")
    await clock.go_on(0)
    await clock.go_on(SLOW_S)
    assert call.done()
    assert reader.refusal == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the client reads too slowly")
