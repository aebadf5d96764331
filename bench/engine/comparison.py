"""The multi-tenant workload on our fleet and on every peer that is there, in rounds that take turns.

Knows systems by their faces. Invariant: all have the same prompts, the same threads and the same room for KV; while
one is measured the others are paused or idle, which is measured too; a peer that is absent is named as absent.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.engine.clients import OpenAISystem, PandoSystem
from bench.engine.drive import Figures, measure_system
from bench.engine.machine import Machine
from bench.engine.processes import ProcessTree, paused
from bench.engine.scenario import MultiTenant
from bench.engine.systems import Serving, llama_server, pando_fleets, swept_logs, vllm_server
from bench.engine.transformers_peer import TransformersPeer
from control.children import descendants
from pando.errors import ConfigError
from pando.settings import WorkerSettings

PEERS = ("vllm", "llama.cpp", "transformers")
MODEL = "bench"
WARM_UP = -1


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """Where peers are: `urls` of servers that run already, by name, or what starts them. What they say is in `logs`
    when all is over."""

    urls: dict[str, str] = field(default_factory=dict)
    vllm_python: Path | None = None
    vllm_preload: str = ""
    llama_server: Path | None = None
    transformers: bool = False
    logs: Path = Path()


@dataclass(frozen=True, slots=True)
class Contest:
    """What all have to do: `rounds` of `scenario`. `machine` measures what the machine can do; `say` tells what came
    of each, `on_round` of all so far."""

    scenario: MultiTenant
    vocab_size: int
    rounds: int
    machine: Callable[[], Machine]
    say: Callable[[str], None]
    on_round: Callable[[Results], None]


@dataclass(slots=True)
class Contestant:
    """A line of the table. `measure` adds to the figures as it comes by them; `processes` are None for a server that
    was there before us; `pausable` says whether it keeps no lease that would lapse."""

    name: str
    measure: Callable[[MultiTenant, int, Figures], Awaitable[None]]
    processes: ProcessTree | None = None
    pausable: bool = True
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    """`load`: the machine's average before it, `figures` by system; `order` is who came first."""

    number: int
    order: tuple[str, ...]
    load: float
    machine: Machine
    figures: dict[str, Figures]


@dataclass(frozen=True, slots=True)
class Results:
    """All that was measured so far. `failures` and `absent`: by name, why."""

    names: tuple[str, ...]
    rounds: tuple[Round, ...]
    failures: dict[str, str]
    absent: dict[str, str]


def compare(serving: Serving, worker: WorkerSettings, peers: PeerOptions, contest: Contest) -> Results:
    """Start all that is there and measure. From the main thread."""
    with ExitStack() as parts:
        logs = parts.enter_context(swept_logs(peers.logs))
        begun = _Begun(parts, contest)
        begun.pando(serving, worker)
        for name, start in _servers(serving, peers, logs).items():
            begun.server(name, start)
        if peers.transformers:
            begun.transformers(serving, logs / "transformers.log")
        absent = begun.absent | dict.fromkeys(_not_asked(peers), "not asked for")
        return asyncio.run(run_contest(contest, begun.contestants, begun.clients, absent))


async def run_contest(
    contest: Contest,
    contestants: Sequence[Contestant],
    clients: Sequence[AbstractAsyncContextManager[Any]],
    absent: dict[str, str],
) -> Results:
    """All rounds; who was first is last in the next. One more before them is small and not kept: libraries load, rates
    are learnt."""
    small = replace(contest.scenario, requests=contest.scenario.tenants)
    rounds: list[Round] = []
    async with AsyncExitStack() as parts:
        for client in clients:
            await parts.enter_async_context(client)
        for one in contestants:
            await _measure(one, contestants, small, WARM_UP)
            contest.say(f"warm-up: {one.name}{': ' + one.failure if one.failure else ''}")
        for number in range(contest.rounds):
            rounds.append(await _round(contest, contestants, number))
            contest.on_round(_results(contestants, rounds, absent))
    return _results(contestants, rounds, absent)


def _results(contestants: Sequence[Contestant], rounds: Sequence[Round], absent: dict[str, str]) -> Results:
    failures = {one.name: one.failure for one in contestants if one.failure}
    return Results(tuple(one.name for one in contestants), tuple(rounds), failures, absent)


async def _round(contest: Contest, contestants: Sequence[Contestant], number: int) -> Round:
    turn = number % len(contestants)
    order = [*contestants[turn:], *contestants[:turn]]
    load = os.getloadavg()[0]
    with paused(_others(None, contestants)):
        machine = contest.machine()
    figures = {}
    for one in order:
        figures[one.name] = await _measure(one, contestants, contest.scenario, number)
        contest.say(f"round {number}: {one.name}: {_line(one, figures[one.name])}")
    return Round(number, tuple(one.name for one in order), load, machine, figures)


async def _measure(one: Contestant, all_of: Sequence[Contestant], scenario: MultiTenant, number: int) -> Figures:
    """Everything once, beside the CPU time of it, of the others and of us who ask; a system that fails keeps what it
    has so far, says why, and is not asked again."""
    found: Figures = {}
    if one.failure:
        return found
    idle = {id(other.processes): other.processes for other in all_of if other.processes not in (None, one.processes)}
    with paused(_others(one, all_of)):
        before = _cpu(one.processes, idle.values())
        try:
            await one.measure(scenario, number, found)
        except Exception as error:  # noqa: BLE001 - one peer's failure must not take the others' figures along
            one.failure = f"{type(error).__name__}: {error}"
        after = _cpu(one.processes, idle.values())
    wall_s = after["wall"] - before["wall"]
    return found | {f"{name}_cores": (after[name] - before[name]) / wall_s for name in after if name != "wall"}


def _others(one: Contestant | None, contestants: Sequence[Contestant]) -> list[ProcessTree]:
    """Whom to pause while this one is measured; two lines may be of one system."""
    mine = None if one is None else one.processes
    trees = [other.processes for other in contestants if other.pausable]
    return list({id(tree): tree for tree in trees if tree is not None and tree is not mine}.values())


def _cpu(own: ProcessTree | None, others: Any) -> dict[str, float]:
    client = time.process_time()
    taken = {"wall": time.perf_counter(), "client": client, "others": sum(tree.cpu_s() for tree in others)}
    return taken if own is None else taken | {"own": own.cpu_s()}


def _line(one: Contestant, figures: Figures) -> str:
    parts = [f"{name} {value:,.2f}" for name, value in figures.items()]
    return ", ".join([*parts, one.failure] if one.failure else parts)


class _Begun:
    """Who takes part, as far as they have been started; `parts` end them."""

    def __init__(self, parts: ExitStack, contest: Contest) -> None:
        self.contestants: list[Contestant] = []
        self.clients: list[AbstractAsyncContextManager[Any]] = []
        self.absent: dict[str, str] = {}
        self._parts = parts
        self._say = contest.say
        self._vocab_size = contest.vocab_size

    def pando(self, serving: Serving, worker: WorkerSettings) -> None:
        """Not paused: a worker whose heartbeat stops is taken for dead."""
        before = set(descendants())
        client = PandoSystem(*self._parts.enter_context(pando_fleets(serving, worker)))
        self._system("pando", client, ProcessTree(set(descendants()) - before), pausable=False)

    def server(self, name: str, start: Callable[[], Any]) -> None:
        """One that does not start is absent."""
        before = set(descendants())
        try:
            url = self._parts.enter_context(start())
        except ConfigError as error:
            self.absent[name] = error.message
            return
        begun = set(descendants()) - before
        self._system(name, OpenAISystem(url, MODEL, name), ProcessTree(begun) if begun else None)

    def transformers(self, serving: Serving, log: Path) -> None:
        """Two lines of one process."""
        local = TransformersPeer(serving.folder, serving.dtype, serving.threads, log)
        self._parts.callback(local.close)
        tree = ProcessTree([local.pid])
        self.contestants.append(Contestant("transformers generate", local.measure_generate, tree))
        self.contestants.append(Contestant("transformers continuous batching", local.measure_continuous, tree))

    def _system(self, name: str, client: Any, tree: ProcessTree | None, *, pausable: bool = True) -> None:
        self._say(f"{name} is up")
        self.clients.append(client)
        self.contestants.append(Contestant(name, partial(measure_system, client, self._vocab_size), tree, pausable))


def _servers(serving: Serving, peers: PeerOptions, logs: Path) -> dict[str, Callable[[], Any]]:
    """How each server that is asked for is had, by name."""
    found: dict[str, Callable[[], Any]] = {}
    if peers.vllm_python is not None:
        python = peers.vllm_python
        found["vllm"] = lambda: vllm_server(python, peers.vllm_preload, serving, logs / "vllm.log")
    if peers.llama_server is not None:
        program = peers.llama_server
        found["llama.cpp"] = lambda: llama_server(program, serving, logs / "llama.cpp.log")
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
