"""Holds the simulator to a real fleet: `python -m bench.fleet_replay --trace FILE`.

The same requests at the same moments and the same settings, once simulated and once sent through the public API to
routers and workers that are processes, with the cost model's sleeps. What a step takes there beside the runner is
measured first, and simulated. Exit code 1 if they do not agree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from array import array
from collections.abc import Awaitable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from xxhash import xxh3_64_intdigest

from bench.process_fleet import ProcessFleet, process_fleet
from bench.sharing.__main__ import show
from bench.sharing.finding import Claim, Finding
from bench.simulate.replay import Fate, FleetShape, Replay
from bench.simulate.replica import ReplicaShape
from bench.simulate.report import quantile
from bench.simulate.trace import Trace, TraceRequest, read_trace
from pando.client import AsyncClient
from pando.errors import ConfigError, ResourceExhausted
from pando.settings import RouterSettings, WorkerSettings

PLACEMENTS = {"pando": "cost", "round_robin": "round_robin"}
"""Policies that a real router has, by the simulator's names."""
MODEL = "pando-tiny"
VOCAB = range(16, 2048)
"""Its token ids that are not special."""
HITS_WITHIN = 0.10
TTFT_WITHIN = 0.25
LEAD_S = 0.5
PROBE_STEPS = (4, 36)
PROBES = 3
"""So many steps do the prompts take by which a fleet's steps are measured, and so often is it asked: the first answers
of a process are late, and others may want the machine, so the least time counts."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of the trace. `late_s`: by how much the client sent a request late, at worst."""

    hit_ratio: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    refused: int
    late_s: float = 0.0


def simulated(trace: Trace, shape: FleetShape, policy: str) -> Seen:
    """By the simulator, where as in the real fleet no head is published."""
    return _seen(Replay(replace(trace, head=0), shape, policy).run().fates, trace.ideal)


def real(trace: Trace, shape: FleetShape, policy: str) -> Seen:
    """By processes, in the trace's own time; call from the main thread. The caches are empty at first."""
    with _fleet(trace, shape, policy) as fleet:
        fates, late_s = asyncio.run(_send(trace, fleet.targets))
    return replace(_seen(fates, trace.ideal), late_s=late_s)


def step_overhead_s(trace: Trace, shape: FleetShape) -> float:
    """What a step of a real fleet takes beside what its runner sleeps, here and now; call from the main thread.

    Scheduling and saying what was done take no time on the simulation's clock, and add up where there is a queue.
    0 where every prompt fits in one step.
    """
    replica = shape.replica(trace)
    few, many = (min(steps * replica.max_batch_tokens, trace.longest * trace.units // 2) for steps in PROBE_STEPS)
    with _fleet(trace, shape, "round_robin") as fleet:
        short_s, long_s = (asyncio.run(_probe(fleet.targets[0], tokens, shape.workers)) for tokens in (few, many))
    slept_s = sum(sign * _slept_s(tokens, replica) for sign, tokens in ((1, many), (-1, few)))
    steps = sum(sign * -(-tokens // replica.max_batch_tokens) for sign, tokens in ((1, many), (-1, few)))
    return max(0.0, (long_s - short_s - slept_s) / steps) if steps else 0.0


def compare(trace: Trace, shape: FleetShape, policies: Sequence[str]) -> Finding:
    """Both, for each policy."""
    rows, claims = [], []
    overhead_s = step_overhead_s(trace, shape)
    paced = replace(shape, step_s=shape.step_s + overhead_s)
    for policy in policies:
        model, fleet = simulated(trace, paced, policy), real(trace, shape, policy)
        rows += [_row(policy, "simulated", model), _row(policy, "real", fleet)]
        hits = abs(model.hit_ratio / fleet.hit_ratio - 1) if fleet.hit_ratio else float(model.hit_ratio > 0)
        ttft = abs(model.ttft_mean_s / fleet.ttft_mean_s - 1)
        claims += [
            Claim(f"{policy}: hit ratio, simulated off real by", round(hits, 3), "<=", HITS_WITHIN),
            Claim(f"{policy}: mean TTFT, simulated off real by", round(ttft, 3), "<=", TTFT_WITHIN),
        ]
    cost = shape.replica(trace).cost
    setting = (
        f"{len(trace.requests)} requests in {trace.span_s:.0f} s, {shape.workers} workers, {shape.routers} routers, "
        f"cache {shape.cache_fraction:g}, a step {cost.step_s * 1e3:g} ms, measured {overhead_s * 1e3:.2f} ms more, "
        f"and {cost.token_s * 1e3:.2f} ms a position"
    )
    return Finding("fleet_replay", setting, tuple(rows), tuple(claims))


def quickened(trace: Trace, speed: float) -> Trace:
    """The same requests in less time; the prefill rate of a fleet follows from it."""
    return replace(trace, requests=tuple(replace(one, arrival_s=one.arrival_s / speed) for one in trace.requests))


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and show; 2 for a trace or a setting that cannot be used."""
    arguments = _parser().parse_args(argv)
    try:
        trace = quickened(
            read_trace(arguments.trace, arguments.block_size, arguments.units, arguments.limit), arguments.speed
        )
        trace = trace.spread() if arguments.spread else trace
        shape = FleetShape(
            workers=arguments.workers,
            cache_fraction=arguments.cache_fraction,
            routers=arguments.routers,
            load=arguments.load,
            step_s=arguments.step_ms / 1e3,
            batch_tokens=arguments.batch_tokens,
        )
        policies = list(PLACEMENTS) if arguments.policy == "all" else [arguments.policy]
        finding = compare(trace, shape, policies)
    except ConfigError as error:
        print(f"bench.fleet_replay: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(finding.document()))
    else:
        show([finding])
    return 0 if finding.met else 1


def _slept_s(tokens: int, replica: ReplicaShape) -> float:
    return -(-tokens // replica.max_batch_tokens) * replica.cost.step_s + tokens * replica.cost.token_s


async def _probe(target: str, tokens: int, workers: int) -> float:
    """Least time to the only token of a prompt, as many at once as there are workers; no two begin alike."""
    least = float("inf")
    async with AsyncClient(target, tenant="probe") as client:
        for probe in range(PROBES):
            firsts = range(probe * workers, (probe + 1) * workers)
            prompts = [array("I", [VOCAB[first], *[VOCAB[tokens % len(VOCAB)]] * (tokens - 1)]) for first in firsts]
            asked = (client.generate(token_ids=prompt, max_tokens=1, ignore_eos=True) for prompt in prompts)
            began = time.monotonic()
            least = min(least, *await asyncio.gather(*(_seconds(one, began) for one in asked)))
    return least


async def _seconds(answer: Awaitable[object], began: float) -> float:
    await answer
    return time.monotonic() - began


def _fleet(trace: Trace, shape: FleetShape, policy: str) -> AbstractContextManager[ProcessFleet]:
    replica = shape.replica(trace)
    worker = WorkerSettings(
        model=MODEL,
        block_size=replica.block_size,
        runner="simulated",
        device_blocks=replica.num_blocks,
        max_batch_tokens=replica.max_batch_tokens,
        max_sequences=replica.max_sequences,
        simulated_step_ms=replica.cost.step_s * 1e3,
        simulated_prefill_tokens_per_s=1.0 / replica.cost.token_s,
    )
    router = RouterSettings(model=MODEL, block_size=replica.block_size, placement=PLACEMENTS[policy])
    return process_fleet(worker, shape.workers, router, shape.routers)


async def _send(trace: Trace, targets: Sequence[str]) -> tuple[list[Fate], float]:
    """Every request at its moment, the routers in turn, whatever became of those before it."""
    clients = [AsyncClient(target, tenant="replay") for target in targets]
    try:
        await asyncio.gather(*(client.list_models() for client in clients))
        start = time.monotonic() + LEAD_S
        calls = [
            _ask(clients[request.number % len(clients)], request, _tokens(trace, request), start)
            for request in trace.requests
        ]
        answered = await asyncio.gather(*calls)
    finally:
        for client in clients:
            await client.close()
    return [fate for fate, _ in answered], max(late_s for _, late_s in answered)


async def _ask(client: AsyncClient, request: TraceRequest, token_ids: array[int], start: float) -> tuple[Fate, float]:
    fate = Fate(request.prompt, start + request.arrival_s)
    await asyncio.sleep(fate.arrival_s - time.monotonic())
    late_s = time.monotonic() - fate.arrival_s
    try:
        async for chunk in client.stream(token_ids=token_ids, max_tokens=request.answer, ignore_eos=True):
            if chunk.token_ids and fate.ttft_s is None:
                fate.ttft_s = time.monotonic() - fate.arrival_s
            if chunk.usage is not None:
                fate.cached = chunk.usage.cached_tokens
    except ResourceExhausted:
        fate.ttft_s = None
    return fate, late_s


def _tokens(trace: Trace, request: TraceRequest) -> array[int]:
    """The simulation's prompt in the model's vocabulary: equal ids stay equal."""
    ids = trace.tokens(request)
    return array("I", (VOCAB[xxh3_64_intdigest(one.to_bytes(8, "little")) % len(VOCAB)] for one in ids))


def _seen(fates: Sequence[Fate], ideal: float) -> Seen:
    ttfts = sorted(fate.ttft_s for fate in fates if fate.ttft_s is not None)
    if not ttfts:
        raise ConfigError("no request was answered")
    hits = sum(fate.cached for fate in fates) / sum(fate.prompt for fate in fates)
    refused = len(fates) - len(ttfts)
    return Seen(hits / ideal if ideal else 1.0, mean(ttfts), quantile(ttfts, 0.5), quantile(ttfts, 0.99), refused)


def _row(policy: str, fleet: str, seen: Seen) -> dict[str, Any]:
    return {
        "policy": policy,
        "fleet": fleet,
        "hits / ideal": round(seen.hit_ratio, 3),
        "TTFT mean s": round(seen.ttft_mean_s, 3),
        "p50 s": round(seen.ttft_p50_s, 3),
        "p99 s": round(seen.ttft_p99_s, 3),
        "refused": seen.refused,
        "sent late, at most s": round(seen.late_s, 3),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.fleet_replay", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--block-size", type=int, default=512, help="tokens that a hash id of the trace stands for")
    parser.add_argument("--units", type=int, default=16, help="positions of a block, here and there")
    parser.add_argument("--limit", type=int, default=300, help="the first requests only")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster than in the trace they arrive")
    parser.add_argument("--spread", action="store_true", help="equal timestamps: spread evenly until the next one")
    parser.add_argument("--policy", choices=("all", *PLACEMENTS), default="all")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--cache-fraction", type=float, default=0.3, help="all caches over the trace's distinct blocks")
    parser.add_argument("--load", type=float, default=0.9, help="of the fleet, if nothing were found in a cache")
    parser.add_argument("--step-ms", type=float, default=20.0, help="fixed part of a step")
    parser.add_argument("--batch-tokens", type=int, default=512, help="token budget of a step, in the trace's tokens")
    parser.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
