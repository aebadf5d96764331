"""What a routing decision costs: keys, match, decide, reserve with its events, at 8, 64 and 512 workers.

Drives the router's own fleet with leases and links that are only said. Peers are measured in the same run where they
are installed. Run as `python -m bench.decision [--workers N ...] [--rounds N] [--json]`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from bench.decision_peers import measured
from kvstore.block import BlockKey, WorkerId
from kvstore.block_key import block_keys, key_fingerprint
from kvstore.events import CPU, BlocksStored, TierChanged
from kvstore.lease import Lease
from kvstore.memory_index import MemoryIndex
from kvstore.mirror import Mirror
from kvstore.scope import Region, scope_root
from router.fleet import Fleet
from router.link_messages import AdmissionReport, WorkerLoad
from router.member import Reservation
from router.placement import Prompt
from router.standing import Ask
from router.worker_link import WorkerLink

BLOCK_SIZE = 16
PROMPT_TOKENS = 4096
HEAD_BLOCKS, STORED_BLOCKS = 32, 224
"""Of each prompt: shared by a fleet's prompts of the same head, and held by one worker; the rest is new."""
HEADS = 8
REPORT_EVERY = 400
"""A worker reports once in so many decisions: ten times a second, at 4,000 decisions a second."""
MODEL, FINGERPRINT = "bench", b"b" * 16
REGIONS = (Region(scope_root(b"bench", FINGERPRINT, "tenant:a", block_size=BLOCK_SIZE), None),)


@dataclass(frozen=True, slots=True)
class Spread:
    """Microseconds of CPU, so that the neighbours on the machine do not count."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Figures:
    """`decision`: keys, match, choice. `whole`: also the reservation, its end and the events of what was computed.
    `cpu_tiers`: workers have one, and may give its blocks to each other."""

    workers: int
    cpu_tiers: bool
    blocks: int
    key: Spread
    match: Spread
    choose: Spread
    reserve_and_apply: Spread
    decision: Spread
    whole: Spread
    decisions_per_s: float


class SaidLink:
    """What a fleet needs of a link: always up, its load as it was said."""

    def __init__(self, address: str, *, on_change: Callable[[], None], **_: Any) -> None:
        self.address = address
        self.live, self.reason = True, ""
        self.load: WorkerLoad | None = None
        self.num_loads = self.num_streams = 0
        self._on_change = on_change

    def start(self) -> None:
        """It is up already."""

    async def stop(self) -> None:
        """Nothing to close."""

    def say(self, load: WorkerLoad) -> None:
        """The worker reports."""
        self.load = load
        self.num_loads += 1
        self._on_change()


class SaidMirror:
    """What a fleet needs of a mirror: leases that stay."""

    def __init__(self, workers: int, payload_format: str) -> None:
        self.on_lease_change: Any = None
        self._leases = [_lease(f"worker-{number:04}", payload_format) for number in range(workers)]

    def leases(self) -> dict[WorkerId, Lease]:
        """By worker."""
        return {WorkerId(lease.worker_id): lease for lease in self._leases}


class Stage:
    """A fleet of some workers whose index has `blocks` blocks or more, and prompts to place there.

    With CPU tiers a third of the prompts have the second half of their blocks there alone.
    """

    def __init__(self, workers: int, blocks: int, rng: random.Random, *, cpu_tiers: bool = False) -> None:
        self.index = MemoryIndex()
        self.links: list[SaidLink] = []
        self.fleet = Fleet(
            cast(Mirror, SaidMirror(workers, "bench" if cpu_tiers else "")),
            self.index,
            router="bench",
            model=MODEL,
            block_size=BLOCK_SIZE,
            link_type=cast("Callable[..., WorkerLink]", self._link),
        )
        asyncio.run(self.fleet.start())
        self._rng = rng
        heads = [_tokens(HEAD_BLOCKS * BLOCK_SIZE, rng) for _ in range(HEADS)]
        self.prompts: list[array[int]] = []
        names = [f"worker-{number:04}" for number in range(workers)]
        while len(self.index) < blocks:
            prompt = rng.choice(heads) + _tokens(PROMPT_TOKENS - HEAD_BLOCKS * BLOCK_SIZE, rng)
            keys = block_keys(REGIONS, prompt, BLOCK_SIZE)
            worker = WorkerId(rng.choice(names))
            self.index.apply(worker, 1, [BlocksStored(list(keys[:STORED_BLOCKS]))])
            if cpu_tiers and len(self.prompts) % 3 == 0:
                self.index.apply(worker, 1, [TierChanged(list(keys[STORED_BLOCKS // 2 : STORED_BLOCKS]), CPU)])
            self.prompts.append(prompt)
        for link in self.links:
            self.say_load(link)

    def say_load(self, link: SaidLink) -> None:
        """A report with something in it."""
        rng = self._rng
        rate = 20_000.0 * rng.uniform(0.995, 1.005)  # moving averages
        link.say(WorkerLoad(rng.randrange(8), 0, rng.randrange(8000), 100, 900, rate, 20.0))

    def _link(self, address: str, **told: Any) -> SaidLink:
        link = SaidLink(address, **told)
        self.links.append(link)
        return link


def measure(workers: int, blocks: int, rounds: int, *, cpu_tiers: bool = False) -> Figures:
    """Decisions one after another, and the workers' reports between them."""
    stage = Stage(workers, blocks, random.Random(workers), cpu_tiers=cpu_tiers)
    took: dict[str, list[float]] = {"key": [], "match": [], "choose": [], "rest": []}
    running: list[Reservation] = []
    gc.collect()
    gc.freeze()
    for number in range(rounds):
        prompt = stage.prompts[number % len(stage.prompts)]
        began = time.thread_time()
        keys = block_keys(REGIONS, prompt, BLOCK_SIZE)
        keyed = time.thread_time()
        stage.index.match(keys)
        matched = time.thread_time()
        ask = Ask(Prompt(len(prompt), 256, keys[HEAD_BLOCKS]), keys)
        stage.fleet.explain(ask)
        explained = time.thread_time()
        _reserve_and_apply(stage, ask, keys, running)
        ended = time.thread_time()
        decided = explained - matched
        took["key"].append(keyed - began)
        took["match"].append(matched - keyed)
        took["choose"].append(decided - (matched - keyed))  # `explain` matches again
        took["rest"].append(ended - explained - decided)  # and `reserve` decides again
        # Each worker reports ten times a second, of which this many are due.
        for report in range(number * workers // REPORT_EVERY, (number + 1) * workers // REPORT_EVERY):
            stage.say_load(stage.links[report % workers])
    gc.unfreeze()
    decision = [sum(times) for times in zip(took["key"], took["match"], took["choose"], strict=True)]
    whole = [sum(times) for times in zip(decision, took["rest"], strict=True)]
    return Figures(
        workers=workers,
        cpu_tiers=cpu_tiers,
        blocks=len(stage.index),
        key=_spread(took["key"]),
        match=_spread(took["match"]),
        choose=_spread(took["choose"]),
        reserve_and_apply=_spread(took["rest"]),
        decision=_spread(decision),
        whole=_spread(whole),
        decisions_per_s=round(rounds / sum(whole)),
    )


def _reserve_and_apply(stage: Stage, ask: Ask, keys: Sequence[BlockKey], running: list[Reservation]) -> None:
    """Take the place, tell the first output of an older request and its end, apply what it stored."""
    reservation = stage.fleet.reserve(ask)
    assert isinstance(reservation, Reservation)
    running.append(reservation)
    if len(running) > 16:
        oldest = running.pop(0)
        cached = oldest.placement.predicted_cached
        oldest.started(AdmissionReport(cached_device=cached))
        oldest.release()
        stored = oldest.ask.keys[cached // BLOCK_SIZE :]
        stage.index.apply(oldest.worker, 1, [BlocksStored(list(stored))])


def _spread(seconds: Sequence[float]) -> Spread:
    ordered = sorted(seconds)
    return Spread(round(ordered[len(ordered) // 2] * 1e6, 1), round(ordered[int(len(ordered) * 0.99)] * 1e6, 1))


def _tokens(count: int, rng: random.Random) -> array[int]:
    return array("I", (rng.randrange(50_000) for _ in range(count)))


def _lease(worker: str, payload_format: str) -> Lease:
    return Lease(
        worker_id=worker,
        epoch=1,
        address=worker,
        model=MODEL,
        block_size=BLOCK_SIZE,
        key_fingerprint=key_fingerprint(FINGERPRINT, BLOCK_SIZE),
        model_fingerprint=FINGERPRINT.hex(),
        pid=1,
        device_blocks=8192,
        max_model_len=32_768,
        vocab_size=50_000,
        max_sequences=64,
        max_waiting=1024,
        payload_format=payload_format,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--blocks", type=int, default=50_000, help="in the index, at least")
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    given = parser.parse_args()
    figures = [
        measure(workers, given.blocks, given.rounds, cpu_tiers=cpu_tiers)
        for cpu_tiers in (False, True)
        for workers in given.workers
    ]
    longest = _longest_key(given.rounds)
    peers = {name: _spread(times) for name, times in _peer_times(given.rounds).items()}
    if given.json:
        document = {
            "fleets": [asdict(row) for row in figures],
            "key_8192_us": asdict(longest),
            "peers_us": {name: asdict(spread) for name, spread in peers.items()},
        }
        print(json.dumps(document))
        return
    print(f"a prompt of {PROMPT_TOKENS} tokens; microseconds, p50 / p99")
    print(
        "workers tiers  blocks         key       match      choose     decision  reserve+apply       whole decisions/s"
    )
    for row in figures:
        parts = (row.key, row.match, row.choose, row.decision, row.reserve_and_apply, row.whole)
        columns = "  ".join(f"{part.p50:>5.0f}/{part.p99:>5.0f}" for part in parts)
        tiers = 2 if row.cpu_tiers else 1
        print(f"{row.workers:>7} {tiers:>5} {row.blocks:>7} {columns} {row.decisions_per_s:>11.0f}")
    print(f"keys of 8192 tokens: {longest.p50:.0f} / {longest.p99:.0f}")
    for name, spread in peers.items():
        print(f"{name}: {spread.p50:.0f} / {spread.p99:.0f}")


def _longest_key(rounds: int) -> Spread:
    prompt = _tokens(8192, random.Random(1))
    times = []
    for _ in range(rounds):
        began = time.thread_time()
        block_keys(REGIONS, prompt, BLOCK_SIZE)
        times.append(time.thread_time() - began)
    return _spread(times)


def _peer_times(rounds: int) -> dict[str, list[float]]:
    """What the peers that are installed take for the same prompts."""
    stage = Stage(8, 50_000, random.Random(8))
    return measured(stage.prompts, BLOCK_SIZE, rounds)


if __name__ == "__main__":
    main()
