"""The multi-tenant workload on our fleet and on every peer that is there, in rounds that take turns.

Knows systems by their faces. Invariant: all have the same prompts, the same threads and the same room for KV, and a
peer that is absent is named as absent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine.clients import OpenAISystem, PandoSystem
from bench.engine.drive import System, WorkloadFigures, measure_single, measure_workload, median_of
from bench.engine.scenario import MultiTenant
from bench.engine.systems import Serving, llama_server, pando_fleets, vllm_server
from bench.engine.transformers_peer import TransformersPeer
from pando.errors import ConfigError
from pando.settings import WorkerSettings

Say = Callable[[str], None]
PEERS = ("vllm", "llama.cpp", "transformers")
MODEL = "bench"


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Where peers are: `urls` of servers that run already, by name, or what starts them."""

    urls: dict[str, str] = field(default_factory=dict)
    vllm_python: Path | None = None
    vllm_preload: str = ""
    llama_server: Path | None = None
    transformers: bool = False
    logs: Path = Path()


@dataclass(slots=True)
class Row:
    """One line of the table; a list has a value a round. `reuse` is empty where a system cannot."""

    name: str
    reuse: list[WorkloadFigures] = field(default_factory=list)
    without: list[WorkloadFigures] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    failure: str = ""

    def document(self) -> dict[str, Any]:
        """Medians, and every round."""
        return {
            "name": self.name,
            "workload_tokens_per_s": median_of([one.tokens_per_s for one in self.reuse]),
            "ttft_p50_s": median_of([one.ttft_p50_s for one in self.reuse]),
            "ttft_p99_s": median_of([one.ttft_p99_s for one in self.reuse]),
            "without_tokens_per_s": median_of([one.tokens_per_s for one in self.without]),
            "without_ttft_p50_s": median_of([one.ttft_p50_s for one in self.without]),
            "without_ttft_p99_s": median_of([one.ttft_p99_s for one in self.without]),
            "decode_tokens_per_s": median_of(self.decode),
            "prefill_tokens_per_s": median_of(self.prefill),
            "failure": self.failure,
            "rounds": {name: value for name, value in asdict(self).items() if name not in ("name", "failure")},
        }


def compare(
    serving: Serving, worker: WorkerSettings, scenario: MultiTenant, vocab_size: int, peers: PeerOptions,
    *, rounds: int, say: Say,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """A row for each that could be run, and a line for each peer that was not there. From the main thread."""
    absent = []
    with ExitStack() as parts:
        fleets = parts.enter_context(pando_fleets(serving, worker))
        say("our fleets are up")
        systems: list[tuple[System, Row]] = [(PandoSystem(*fleets), Row("pando"))]
        for name, start in _servers(serving, peers).items():
            try:
                url = parts.enter_context(start())
            except ConfigError as error:
                absent.append(f"{name}: {error.message}")
                continue
            say(f"{name} is up")
            systems.append((OpenAISystem(url, MODEL, name), Row(name)))
        local = None
        if peers.transformers:
            local = TransformersPeer(serving.folder, serving.dtype, serving.threads)
            parts.callback(local.close)
        absent += [f"{name}: not asked for" for name in _not_asked(peers)]
        local_rows = [Row("transformers generate"), Row("transformers continuous batching")] if local else []
        contest = _Contest(scenario, vocab_size, say, systems, local, local_rows)
        asyncio.run(contest.run(rounds))
    return [*(row for _, row in systems), *local_rows], absent


def _servers(serving: Serving, peers: PeerOptions) -> dict[str, Callable[[], Any]]:
    """How each server that is asked for is had, by name."""
    found: dict[str, Callable[[], Any]] = {}
    if peers.vllm_python is not None:
        python = peers.vllm_python
        found["vllm"] = lambda: vllm_server(python, peers.vllm_preload, serving, peers.logs / "vllm.log")
    if peers.llama_server is not None:
        program = peers.llama_server
        found["llama.cpp"] = lambda: llama_server(program, serving, peers.logs / "llama.log")
    for name, url in peers.urls.items():
        found[name] = partial(nullcontext, url)
    return found


def _not_asked(peers: PeerOptions) -> list[str]:
    there = {
        "vllm": peers.vllm_python is not None or "vllm" in peers.urls,
        "llama.cpp": peers.llama_server is not None or "llama.cpp" in peers.urls,
        "transformers": peers.transformers,
    }
    return [name for name in PEERS if not there[name]]


@dataclass(frozen=True, slots=True)
class _Contest:
    """What all have to do, and who does it."""

    scenario: MultiTenant
    vocab_size: int
    say: Say
    systems: Sequence[tuple[System, Row]]
    local: TransformersPeer | None
    local_rows: Sequence[Row]

    async def run(self, rounds: int) -> None:
        """All rounds. One more before them is small and not kept: libraries load, rates are learnt."""
        small = replace(self.scenario, requests=self.scenario.tenants)
        async with AsyncExitStack() as clients:
            for system, _ in self.systems:
                await clients.enter_async_context(system)  # type: ignore[arg-type]
            for system, row in self.systems:
                first = Row(row.name)
                await _measure(system, first, small, self.vocab_size, -1)
                row.failure = first.failure
            for number in range(rounds):
                await self._round(number)

    async def _round(self, number: int) -> None:
        for system, row in self.systems:
            await _measure(system, row, self.scenario, self.vocab_size, number)
            self.say(f"round {number}: {row.name}: {_last(row)}")
        if self.local is not None:
            _measure_local(self.local, self.local_rows, self.scenario, number)
            for row in self.local_rows:
                self.say(f"round {number}: {row.name}: {_last(row)}")


async def _measure(system: System, row: Row, scenario: MultiTenant, vocab_size: int, number: int) -> None:
    """Everything once; a system that fails keeps what it has so far and says why."""
    if row.failure:
        return
    try:
        row.reuse.append(await measure_workload(system, scenario, vocab_size, number, reuse=True))
        row.without.append(await measure_workload(system, scenario, vocab_size, number, reuse=False))
        decode, prefill = await measure_single(system, vocab_size, number)
        row.decode.append(decode)
        row.prefill.append(prefill)
    except Exception as error:  # noqa: BLE001 - one peer's failure must not take the others' figures along
        row.failure = f"{type(error).__name__}: {error}"


def _measure_local(local: TransformersPeer, rows: Sequence[Row], scenario: MultiTenant, number: int) -> None:
    batches, continuous = rows
    try:
        batches.without.append(local.workload(scenario, number, continuous=False))
        decode, prefill = local.single(number)
        batches.decode.append(decode)
        batches.prefill.append(prefill)
    except RuntimeError as error:
        batches.failure = str(error)
    try:
        continuous.reuse.append(local.workload(scenario, number, continuous=True))
    except RuntimeError as error:
        continuous.failure = str(error)


def _last(row: Row) -> str:
    if row.failure:
        return row.failure
    parts = [f"{ones[-1].tokens_per_s:.0f} tokens/s" for ones in (row.reuse, row.without) if ones]
    parts += [f"{values[-1]:.0f}" for values in (row.decode, row.prefill) if values]
    return ", ".join(parts)
