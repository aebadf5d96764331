"""The comparison's HTTP client against servers of loopback that behave as some do."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench.engine.clients import OpenAISystem
from bench.engine.drive import ask_all
from bench.engine.scenario import Ask

ASK = Ask("tenant-0", (300, 301), 2)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWER = ({"choices": [{"text": "ab", "tokens": [5, 6]}]}, {"choices": [], "usage": {"completion_tokens": 2}})
EVENTS = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in ANSWER)


class OneAnswer:
    """A server that answers one request of each connection, says nothing of its end, and hangs up at the next.
    With `stays_silent` it never answers."""

    def __init__(self, *, stays_silent: bool = False) -> None:
        self.connections = self.gone = 0
        self._stays_silent = stays_silent

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self._read(reader)
        if self._stays_silent:
            await reader.read()
            self.gone += 1
        else:
            writer.write(HEAD + b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENTS), EVENTS))
            await writer.drain()
            await reader.read(1)
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [size] = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")]
        await reader.readexactly(int(size))


def test_a_server_that_closes_connections_between_requests_answers_all() -> None:
    async def run() -> OneAnswer:
        behaviour = OneAnswer()
        async with (
            await asyncio.start_server(behaviour, "127.0.0.1", 0) as server,
            OpenAISystem(url_of(server), "m", "llama.cpp") as system,
        ):
            for _ in range(2):
                samples = await ask_all(system, [ASK] * 3, concurrency=2, reuse=True)
                assert [one.tokens for one in samples] == [2, 2, 2]
        return behaviour

    assert asyncio.run(run()).connections == 6


def test_a_failure_takes_the_other_requests_back() -> None:
    """Else the server would work on them while the next system is measured."""

    class FailsOne(OpenAISystem):
        async def stream(self, ask, *, reuse):  # type: ignore[no-untyped-def]
            if ask is not ASK:
                await asyncio.sleep(0.2)
                raise RuntimeError("not this one")
            async for count in super().stream(ask, reuse=reuse):
                yield count

    async def run() -> OneAnswer:
        behaviour = OneAnswer(stays_silent=True)
        async with (
            await asyncio.start_server(behaviour, "127.0.0.1", 0) as server,
            FailsOne(url_of(server), "m", "llama.cpp") as system,
        ):
            with pytest.raises(RuntimeError, match="not this one"):
                await ask_all(system, [ASK, ASK, Ask("tenant-1", (302,), 2)], concurrency=3, reuse=True)
            async with asyncio.timeout(10):
                while behaviour.gone < 2:
                    await asyncio.sleep(0.01)
        return behaviour

    assert asyncio.run(run()).gone == 2


def url_of(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
