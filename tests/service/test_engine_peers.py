"""The comparison: its HTTP client against servers that behave as some do, and all of it on a small model."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.engine import machine
from bench.engine.__main__ import main
from bench.engine.checkpoints import SHAPES, write_checkpoint
from bench.engine.clients import OpenAISystem
from bench.engine.drive import ask_all
from bench.engine.report import COLUMNS
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


@pytest.mark.timeout(180)
def test_a_comparison_of_ours_and_a_local_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MATRIX", 64)
    monkeypatch.setattr(machine, "READ_BYTES", 1 << 16)
    shape = replace(SHAPES["llama-40m"], hidden_size=32, layers=1, heads=4, kv_heads=2, head_dim=8,
                    intermediate_size=48, vocab_size=320)  # fmt: skip
    write_checkpoint(tmp_path / "model", shape, 0)
    values = {
        "tenants": 2,
        "system_tokens": 32,
        "requests": 4,
        "unique_tokens": 8,
        "output_tokens": 4,
        "concurrency": 2,
    }
    (tmp_path / "one.toml").write_text("\n".join(f"{name} = {value}" for name, value in values.items()))
    options = {
        "--model": "model", "--scenario": "one.toml", "--logs": "logs", "--json": "found.json",
        "--llama-server": "no-such-program",
    }  # fmt: skip
    paths = [part for name, value in options.items() for part in (name, str(tmp_path / value))]
    words = ["--dtype", "bfloat16", "--rounds", "2", "--threads", "1", "--transformers"]
    assert main(["workload", *words, *paths]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    local = ["transformers generate", "transformers continuous batching"]
    assert found["failures"] == {} and set(found["absent"]) == {"vllm", "llama.cpp"}
    assert [each["order"] for each in found["rounds"]] == [["pando", *local], [*local, "pando"]]
    for each in found["rounds"]:
        assert set(each["figures"]["pando"]) >= set(COLUMNS) | {"own_cores", "others_cores", "client_cores"}
        assert each["machine"]["dtype"] == "bfloat16" and each["figures"]["pando"]["others_cores"] == 0.0
    assert "| pando " in (tmp_path / "found.md").read_text()
    assert (tmp_path / "logs" / "transformers.log").is_file()
